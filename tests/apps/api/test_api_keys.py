"""Every key of OpenAI's requests, and those of other servers: used, left out of account with a note, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from vlm.apps.api.errors import ApiError
from vlm.apps.api.limits import Limits
from vlm.apps.api.parse import parse_request
from vlm.apps.api.response_schemas import ResponseRequest
from vlm.apps.api.schemas import ChatRequest
from vlm.apps.api.service import sampling_settings
from vlm.apps.api.text_schemas import TextRequest
from vlm.apps.api.unread import REFUSED, Noted, header_value, unread_keys


def words(text: str) -> list[str]:
    return text.split()


# keys of the request bodies in openai 3.57 (November 2026)
CHAT = words(
    "messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
    "max_tokens metadata modalities moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key "
    "prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed "
    "service_tier stop store stream stream_options temperature tool_choice tools top_logprobs top_p user "
    "verbosity web_search_options"
)
TEXT = words(
    "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop "
    "stream stream_options suffix temperature top_p user"
)
RESPONSES = words(
    "access_programs background background_options context_management conversation image include input "
    "instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls "
    "previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning "
    "safety_identifier service_tier store stream stream_options temperature text tool_choice tools top_logprobs "
    "top_p truncation user"
)
# what changes no word of a reply here, or only how fast it comes, or is an offer that the model need not take
IGNORED = set(
    words(
        "functions metadata parallel_tool_calls prediction prompt_cache_key prompt_cache_options "
        "prompt_cache_retention reasoning_effort safety_identifier service_tier store tools user verbosity "
        "access_programs background_options context_management image max_tool_calls reasoning truncation "
        "stream_options"
    )
)
# of vLLM, SGLang, llama.cpp, Ollama, LM Studio and Open WebUI, beyond OpenAI's
IGNORED_OF_OTHERS = words(
    "chat_template_kwargs keep_alive options num_ctx mirostat mirostat_tau tfs_z typical_p min_tokens ignore_eos "
    "skip_special_tokens add_generation_prompt continue_final_message length_penalty repeat_last_n num_predict "
    "cache_prompt id_slot stop_token_ids think enable_thinking priority request_id truncate_prompt_tokens"
)
BODIES: dict[Any, dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    TextRequest: {"model": "m", "prompt": "Hi"},
    ResponseRequest: {"model": "m", "input": "Hi"},
}


def parse(kind: Any, **changes: Any) -> Any:
    return parse_request(BODIES[kind] | changes, kind, Limits())


@pytest.mark.parametrize(("kind", "keys"), [(ChatRequest, CHAT), (TextRequest, TEXT), (ResponseRequest, RESPONSES)])
def test_every_key_of_openais_request_is_used_or_noted_or_refused(kind: Any, keys: list[str]):
    undecided = set(keys) - set(kind.model_fields) - set(REFUSED) - IGNORED
    assert undecided - {"prompt"} == set()  # a stored prompt of /v1/responses: the test below
    for key in (set(keys) & IGNORED) - set(kind.model_fields):
        assert unread_keys(parse(kind, **{key: {"a": 1}})) == [key]


@pytest.mark.parametrize("key", IGNORED_OF_OTHERS)
def test_keys_of_other_servers_that_only_tune_are_noted(key: str):
    for kind in BODIES:
        assert unread_keys(parse(kind, **{key: [1]})) == [key]


SAMPLING = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "repeat_penalty": 1.2, "seed": 1}


@pytest.mark.parametrize("kind", [ChatRequest, TextRequest])
def test_sampling_settings_beyond_openais_are_used(kind: Any):
    asked = parse(kind, **SAMPLING)
    assert unread_keys(asked) == []
    assert {name: getattr(asked, name) for name in SAMPLING} == SAMPLING


# (request, key, value): a reply without it would be a wrong answer
WRONG_WITHOUT: list[tuple[Any, str, Any]] = [
    (ChatRequest, "tool_choice", "required"),
    (ChatRequest, "tool_choice", {"type": "function", "function": {"name": "f"}}),
    (ChatRequest, "tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}),
    (ChatRequest, "function_call", {"name": "f"}),
    (ChatRequest, "modalities", ["text", "audio"]),
    (ChatRequest, "audio", {"voice": "alloy", "format": "wav"}),
    (ChatRequest, "web_search_options", {"user_location": None}),
    (ChatRequest, "moderation", {"model": "m"}),
    (ChatRequest, "guided_json", {"type": "object"}),
    (ChatRequest, "structured_outputs", {"choice": ["a"]}),
    (ChatRequest, "grammar", "root ::= a"),
    (ChatRequest, "format", "json"),
    (ChatRequest, "documents", [{"text": "read me"}]),
    (ChatRequest, "images", ["aGk="]),
    (ChatRequest, "system", "Be brief."),
    (ChatRequest, "prompt", "Hi"),
    (ChatRequest, "input", "Hi"),
    (ChatRequest, "text", {"format": {"type": "json_object"}}),
    (TextRequest, "suffix", "end"),
    (TextRequest, "best_of", 3),
    (TextRequest, "messages", [{"role": "user", "content": "Hi"}]),
    (TextRequest, "response_format", {"type": "json_object"}),
    (ResponseRequest, "tool_choice", "required"),
    (ResponseRequest, "tool_choice", {"type": "allowed_tools", "mode": "required", "tools": []}),
    (ResponseRequest, "previous_response_id", "resp_1"),
    (ResponseRequest, "conversation", "conv_1"),
    (ResponseRequest, "background", True),
    (ResponseRequest, "prompt", {"id": "pmpt_1"}),
    (ResponseRequest, "response_format", {"type": "json_object"}),
]


@pytest.mark.parametrize(("kind", "key", "value"), WRONG_WITHOUT)
def test_what_a_reply_would_be_wrong_without_is_refused_by_name(kind: Any, key: str, value: Any):
    with pytest.raises(ApiError, match=key) as caught:
        parse(kind, **{key: value})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, key, "unsupported")


NOTHING_ASKED = {"tool_choice": "auto", "tools": [], "functions": None, "function_call": "none", "audio": None,
                 "modalities": ["text"], "web_search_options": None, "best_of": 1, "suffix": "", "background": False,
                 "format": "", "documents": [], "use_beam_search": False, "keep_alive": None}  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
def test_values_that_ask_for_nothing_are_neither_refused_nor_noted(kind: Any):
    assert unread_keys(parse(kind, **NOTHING_ASKED)) == []


def test_all_tokens_are_considered_in_the_words_of_vllm_too():
    assert sampling_settings(parse(ChatRequest, top_k=-1), 0) == sampling_settings(parse(ChatRequest, top_k=0), 0)
    with pytest.raises(ApiError, match="top_k"):
        parse(ChatRequest, top_k=-2)


def test_no_log_probabilities_may_be_asked_for_by_their_number():
    assert parse(ChatRequest, logprobs=False, top_logprobs=0).num_logprobs is None


@pytest.mark.parametrize(
    "choice", [None, "none", "auto", {"type": "auto"}, {"type": "allowed_tools", "mode": "auto", "tools": []}]
)
def test_tools_that_need_not_be_called_are_left_out_of_account_with_a_note(choice: Any):
    tools = [{"type": "function", "function": {"name": "get_current_timestamp", "parameters": {"type": "object"}}}]
    assert unread_keys(parse(ChatRequest, tools=tools, tool_choice=choice)) == ["tools"]


def test_keys_within_messages_are_noted_with_their_place_and_media_are_refused():
    replies = {"role": "assistant", "content": "Yes.", "refusal": None, "annotations": [], "audio": None,
               "tool_calls": None, "reasoning_content": "hm"}  # fmt: skip
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    asked = {"role": "user", "name": "bob", "content": [part]}
    noted = unread_keys(parse(ChatRequest, messages=[asked, replies, asked]))
    assert noted == ["messages[].name", "messages[].content[].cache_control", "messages[].reasoning_content"]
    for key in ("images", "audio", "files"):
        with pytest.raises(ApiError, match=rf"messages\[1\]\.{key} is not supported"):
            parse(ChatRequest, messages=[asked, {"role": "assistant", "content": "Yes.", key: [{"a": 1}]}, asked])


def test_names_that_a_header_or_a_log_could_not_hold_are_left_out():
    hostile = {"a\r\nSet-Cookie: x": 1, "b" * 500: 1, "ключ": 1, "fine_1.5-x": 1}
    assert unread_keys(parse(ChatRequest, **hostile)) == ["fine_1.5-x"]
    names = [f"key{number}" for number in range(100_000)]
    assert len(header_value(names)) < 400
    assert header_value(names).endswith("key31, and 99968 more")
    noted = Noted()
    assert noted.new(["a", "b"]) == ["a", "b"]
    assert noted.new(["b", "c"]) == ["c"]
    assert sum(len(noted.new([name])) for name in names) == 253  # 256 in all, whatever is sent


PART_ERRORS: dict[str, tuple[list[Any], str]] = {
    "unknown": ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "messages[0].content[1]: type is 'input_a"),
    "no type": ([{"text": "a"}], "messages[0].content[0]: "),
    "no text": ([{"type": "text"}], "messages[0].content[0].text: Field required"),
    "no url": ([{"type": "image_url", "image_url": {}}], "messages[0].content[0].image_url.url: Field required"),
    "number": ([{"type": "text", "text": 5}], "messages[0].content[0].text: Input should be a valid string"),
    "no object": (["a"], "messages[0].content[0]: "),
}  # fmt: skip


@pytest.mark.parametrize("name", PART_ERRORS)
def test_an_error_in_a_list_of_parts_names_the_part(name: str):
    parts, message = PART_ERRORS[name]
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, messages=[{"role": "user", "content": parts}])
    assert caught.value.message.startswith(message)
    assert caught.value.param == "messages"


def test_errors_in_items_of_a_response_name_the_item_and_the_part():
    for value, message in (
        ([{"type": "item_reference", "id": "5"}], "input[0]: type is 'item_reference'; known:"),
        ([{"type": "function_call", "name": "f"}], "input[0].arguments: Field required"),
        ([{"role": "user", "content": [{"type": "input_file"}]}], "input[0].content[0]: type is 'input_file'"),
        ([{"role": "tool", "content": "a"}], "input[0].role: "),
        ([{"role": "system", "content": [{"type": "input_image", "image_url": "data:,"}]}], "input[0]: an input_image"),
        ([{"type": "reasoning", "summary": []}], "input: there is no message"),
    ):
        with pytest.raises(ApiError) as caught:
            parse(ResponseRequest, input=value)
        assert caught.value.message.startswith(message)


def test_images_may_be_named_by_a_string_and_at_any_detail():
    for url in ("data:,", {"url": "data:,"}, {"url": "data:,", "detail": "original"}):
        asked = parse(ChatRequest, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": url}]}])
        assert asked.messages[0].content[0].image_url.url == "data:,"


def test_a_response_asks_the_same_as_a_chat():
    parts = [{"type": "input_image", "image_url": "data:,"}, {"type": "input_text", "text": "What is this?"}]
    items = [
        {"role": "user", "content": parts},
        {"type": "reasoning", "summary": []},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "A cat.", "annotations": []}]},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    asked = parse(ResponseRequest, input=items, instructions="Be brief.", max_output_tokens=7, temperature=0, seed=3,
                  text={"format": form}, include=["message.output_text.logprobs"], top_logprobs=2)  # fmt: skip
    chat = parse(
        ChatRequest,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image_url", "image_url": "data:,"},
                                         {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Sure?"},
        ],
        max_completion_tokens=7, temperature=0, seed=3, logprobs=True, top_logprobs=2,
        response_format={"type": "json_schema", "schema": {"type": "object"}},
    )  # fmt: skip
    assert asked.as_chat() == chat
    assert parse(ResponseRequest, input="Hi").as_chat() == parse(ChatRequest)
