"""/v1/completions and /v1/responses, whole and streamed, beside the same question as a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_server import NAME, SMALL, ask, user
from openai.types import Completion
from openai.types.responses import Response
from tokenizers_for_tests import sentencepiece_like

from vlm.apps.api.errors import ApiError, timed_out
from vlm.apps.api.prompt import PromptBuilder
from vlm.apps.api.response_form import ResponseForm
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.inference.load import LoadedModel

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
Call = Callable[..., httpx.Response]


def good(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text[:400]
    return response.json()


def events(response: httpx.Response) -> Iterator[tuple[str | None, Any]]:
    """Name and data of each server-sent event."""
    assert response.status_code == 200, response.text[:400]
    assert response.headers["content-type"].startswith("text/event-stream")
    for block in response.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        yield fields.get("event"), None if fields["data"] == "[DONE]" else json.loads(fields["data"])


def plain(prompt: Any, **changes: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 6, "logit_bias": {"2": -100}} | changes


# /v1/completions


def test_a_prompt_written_by_the_client_gets_the_reply_of_the_same_chat(call: Call):
    """Control words count, as on every server with this route; the text is read as it is."""
    chat = good(call("POST", CHAT, json=ask(max_tokens=6, logit_bias={"2": -100})))
    prompt = "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    answer = good(call("POST", TEXT, json=plain(prompt)))
    Completion.model_validate(answer, strict=True)
    assert answer["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"] == chat["usage"]
    assert (answer["object"], answer["choices"][0]["finish_reason"]) == ("text_completion", "length")


def test_a_prompt_may_be_token_ids_and_there_may_be_several(call: Call, loaded: LoadedModel):
    texts = ["What is", "One two"]
    ids = [loaded.tokenizer(text).input_ids for text in texts]
    alone = [good(call("POST", TEXT, json=plain(text)))["choices"][0]["text"] for text in texts]
    assert alone[0] != alone[1]
    for prompts in (texts, ids):
        choices = good(call("POST", TEXT, json=plain(prompts)))["choices"]
        assert [(choice["index"], choice["text"]) for choice in choices] == list(enumerate(alone))
    both = good(call("POST", TEXT, json=plain(texts, n=2, temperature=2, seed=5)))
    one = good(call("POST", TEXT, json=plain(texts[1], n=2, temperature=2, seed=5)))
    assert [choice["text"] for choice in both["choices"][2:]] == [choice["text"] for choice in one["choices"]]
    assert both["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert good(call("POST", TEXT, json=plain(ids[0])))["choices"][0]["text"] == alone[0]


def test_echo_and_log_probabilities_are_written_as_that_route_writes_them(call: Call):
    free = good(call("POST", TEXT, json=plain("What is")))["choices"][0]["text"]
    choice = good(call("POST", TEXT, json=plain("What is", echo=True, logprobs=2)))["choices"][0]
    assert choice["text"] == "What is" + free
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 6
    assert told["text_offset"][0] == len("What is")
    assert told["text_offset"][1] == len("What is") + len(told["tokens"][0])
    assert max(told["top_logprobs"][0].values()) == told["token_logprobs"][0]  # greedy takes the likeliest


def test_a_streamed_completion_adds_up_to_the_whole_one(call: Call):
    whole = good(call("POST", TEXT, json=plain(["What is", "One"], echo=True)))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, (_, done) = events(call("POST", TEXT, json=plain(["What is", "One"], echo=True, **options)))
    assert done is None
    texts = ["", ""]
    for _, chunk in chunks:
        Completion.model_validate(chunk | {"choices": []}, strict=True)
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert chunks[-1][1]["usage"] == whole["usage"]
    assert sorted(c["index"] for _, chunk in chunks for c in chunk["choices"] if c["finish_reason"]) == [0, 1]


@pytest.mark.parametrize("name", ["vicuna", "plain"])
def test_a_prompt_begins_as_all_prompts_of_the_model_do_and_once(loaded: LoadedModel, name: str):
    """Whether or not the client puts the begin token there, and whether or not the tokenizer adds it by itself."""
    tokenizer = sentencepiece_like()
    tokens = ConversationTokenizer(tokenizer, TEMPLATES[name])
    llama = replace(loaded, tokenizer=tokenizer, conversation_tokenizer=tokens)
    build = PromptBuilder(llama, 1024, SMALL, "prompt")
    written = [build._tokenize(text) for text in ("A dog", "<s>A dog")]
    assert written[0] == written[1] == tokenizer("A dog").input_ids
    assert written[0].count(tokenizer.bos_token_id) == 1
    tokenizer.backend_tokenizer.post_processor = None
    assert build._tokenize("A dog") == written[0]


PROMPTS: dict[str, tuple[Any, str]] = {
    "image": ("<image> What is this?", "place of an image"),
    "no id": ([5, 10**7], "is not a token id"),
    "negative": ([5, -1], "prompt"),
    "empty": ("", "empty"),
    "nothing": ([], "prompt"),
    "nine prompts": (["a"] * 9, "9 replies"),
    "long": ("one " * 3000, "tokens"),
    "mixed": (["a", 5], "prompt"),
    "number": (5, "prompt"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_cannot_be_read_are_named(call: Call, name: str):
    prompt, message = PROMPTS[name]
    answer = call("POST", TEXT, json=plain(prompt))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert message in answer.json()["error"]["message"]


# /v1/responses


def response(**changes: Any) -> dict[str, Any]:
    return {"model": NAME, "input": "What is this?", "temperature": 0, "max_output_tokens": 6} | changes


def test_a_response_is_the_reply_of_the_same_chat(call: Call, image: Callable[[int], str]):
    chat = good(call("POST", CHAT, json=ask(messages=user("What is this?", image(1)), max_tokens=6)))
    parts = [{"type": "input_image", "image_url": image(1)}, {"type": "input_text", "text": "What is this?"}]
    answer = good(call("POST", RESPONSES, json=response(input=[{"role": "user", "content": parts}])))
    parsed = Response.model_validate(answer, strict=True)
    assert parsed.output_text == chat["choices"][0]["message"]["content"]
    assert (parsed.status, parsed.usage.input_tokens) == ("incomplete", chat["usage"]["prompt_tokens"])
    assert parsed.incomplete_details.reason == "max_output_tokens"
    assert not answer["store"]


def test_a_response_that_ends_by_itself_is_complete_and_gives_the_request_back(call: Call):
    asked = response(instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=200, seed=1, top_p=0.5,
                     text={"format": {"type": "json_schema", "name": "c", "schema": {"enum": ["red"]}}})  # fmt: skip
    answer = good(call("POST", RESPONSES, json=asked))
    assert answer["output"][0]["content"][0]["text"] == '"red"'
    assert (answer["status"], answer["incomplete_details"]) == ("completed", None)
    given_back = {key: answer[key] for key in ("instructions", "metadata", "max_output_tokens", "top_p", "text")}
    assert given_back == {key: asked[key] for key in given_back}


def test_a_streamed_response_tells_each_step_and_adds_up(call: Call):
    whole = good(call("POST", RESPONSES, json=response()))
    seen = list(events(call("POST", RESPONSES, json=response(stream=True))))
    kinds = [name for name, _ in seen]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.incomplete"]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [data["type"] for _, data in seen] == kinds
    assert [data["sequence_number"] for _, data in seen] == list(range(len(seen)))
    said = "".join(data["delta"] for _, data in seen[4:-4])
    assert said == whole["output"][0]["content"][0]["text"] == seen[-4][1]["text"]
    last = Response.model_validate(seen[-1][1]["response"], strict=True)
    assert last.output_text == said
    assert last.usage.model_dump() == Response.model_validate(whole).usage.model_dump()


def test_log_probabilities_of_a_response_are_included_when_asked_for(call: Call):
    asked = response(include=["message.output_text.logprobs"], top_logprobs=2)
    (text,) = good(call("POST", RESPONSES, json=asked))["output"][0]["content"]
    assert len(text["logprobs"]) == 6
    assert all(len(token["top_logprobs"]) == 2 for token in text["logprobs"])
    (plainly,) = good(call("POST", RESPONSES, json=response()))["output"][0]["content"]
    assert (plainly["logprobs"], plainly["text"]) == ([], text["text"])


def test_errors_name_the_input(call: Call):
    for value, message in (
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,aGk="}]}], "ge 1"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "https://a.example/b.png"}]}], "fetches"),
        ("one " * 3000, "tokens"),
        ([{"role": "system", "content": " "}], "no turn says anything"),
    ):  # fmt: skip
        answer = call("POST", RESPONSES, json=response(input=value))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
        assert message in answer.json()["error"]["message"]


def test_a_stream_that_fails_says_so_in_events_of_its_route():
    class Unread:
        num_prompt_tokens = num_new_tokens = 0

    from vlm.apps.api.response_schemas import ResponseRequest

    form = ResponseForm(Unread(), NAME, ResponseRequest(model=NAME, input="Hi"))  # type: ignore[arg-type]
    for error in (timed_out(5), ApiError(500, "internal error")):
        first, second = form.failed(error).decode().strip().split("\n\n")
        assert first.startswith("event: error\n")
        assert second.startswith("event: response.failed\n")
        told = json.loads(second.partition("data: ")[2])["response"]
        assert (told["status"], told["error"]["message"]) == ("failed", error.message)
