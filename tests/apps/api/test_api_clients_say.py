"""What clients send that OpenAI's documentation does not show: orders of turns, begun replies, notes, 404s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from api_server import ask, user

from vlm.inference.load import LoadedModel
from vlm.inference.messages import to_conversation

CHAT = "/v1/chat/completions"
Call = Callable[..., httpx.Response]
HELLO = {"role": "assistant", "content": "Hello!"}
BRIEF = {"role": "system", "content": "Be brief."}


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text[:400]
    return str(response.json()["choices"][0]["message"]["content"])


ORDERS: dict[str, list[dict[str, Any]]] = {
    "assistant first": [HELLO, *user("Hi")],
    "system, then assistant": [BRIEF, HELLO, *user("Hi")],
    "system in the middle": [*user("Hi"), HELLO, BRIEF, *user("And?")],
    "system last": [*user("Hi"), BRIEF],
    "system only": [BRIEF],
    "two replies in a row": [*user("Hi"), HELLO, HELLO, *user("And?")],
}


@pytest.mark.parametrize("name", ORDERS)
def test_turns_are_read_in_the_order_in_which_they_come(call: Call, loaded: LoadedModel, name: str):
    answer = call("POST", CHAT, json=ask(messages=ORDERS[name]))
    written = loaded.conversation_tokenizer.prompt(to_conversation(ORDERS[name], (), loaded.template))
    assert answer.json()["usage"]["prompt_tokens"] == len(written)
    text = loaded.tokenizer.decode(written)
    roles = [message["role"] for message in ORDERS[name]]
    assert [line for line in text.split("<|im_start|>") if line][:-1] == [
        f"{role}\n{message['content'] if isinstance(message['content'], str) else message['content'][0]['text']}"
        "<|im_end|>\n"
        for role, message in zip(roles, ORDERS[name], strict=True)
    ]


def test_a_last_message_of_the_assistant_is_gone_on_with(call: Call, loaded: LoadedModel):
    messages = [*user("What is this?"), {"role": "assistant", "content": "A red"}]
    rest = call("POST", CHAT, json=ask(messages=messages, max_tokens=6))
    assert content(rest) == loaded.chat(messages, max_new_tokens=6) != ""
    whole = call("POST", CHAT, json=ask(max_tokens=6))
    assert rest.json()["usage"]["prompt_tokens"] > whole.json()["usage"]["prompt_tokens"]
    for nothing in ("", None, []):  # what pages put there before the reply comes
        placeholder = [*user("What is this?"), {"role": "assistant", "content": nothing}]
        assert content(call("POST", CHAT, json=ask(messages=placeholder, max_tokens=6))) == content(whole)


def test_refusals_in_the_history_are_replies(call: Call):
    def told(reply: dict[str, Any]) -> int:
        messages = [*user("Hi"), {"role": "assistant", **reply}, *user("And?")]
        return int(call("POST", CHAT, json=ask(messages=messages)).json()["usage"]["prompt_tokens"])

    as_text = told({"content": "I can not."})
    assert told({"content": [{"type": "refusal", "refusal": "I can not."}]}) == as_text
    assert told({"content": None, "refusal": "I can not."}) == as_text
    assert told({"content": "I can not.", "refusal": None}) == as_text


def test_tools_are_left_out_of_account_and_the_client_is_told(call: Call):
    plain = call("POST", CHAT, json=ask())
    tools = [{"type": "function", "function": {"name": "get_current_timestamp", "parameters": {}}}]
    for choice in (None, "auto", "none"):
        answer = call("POST", CHAT, json=ask(tools=tools, tool_choice=choice))
        assert content(answer) == content(plain)
        assert answer.headers["X-Ignored-Fields"] == "tools"
    assert "X-Ignored-Fields" not in plain.headers
    streamed = call("POST", CHAT, json=ask(tools=tools, keep_alive="5m", stream=True))
    assert streamed.headers["X-Ignored-Fields"] == "tools, keep_alive"


def test_the_owner_of_a_server_reads_each_name_once(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]):
    from api_server import make_service

    service = make_service(loaded)
    for _ in range(3):
        service.note(["tools"])
    service.note(["tools", "keep_alive"])
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "does not use" in line]
    assert [line.rpartition(": ")[2] for line in lines] == ["tools", "keep_alive"]


def test_another_model_than_the_one_served_is_404_on_every_route(call: Call):
    for path, body in (
        (CHAT, ask(model="gpt-4")),
        ("/v1/completions", {"model": "gpt-4", "prompt": "a"}),
        ("/v1/responses", {"model": "gpt-4", "input": "a"}),
    ):
        answer = call("POST", path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "it serves tiny" in answer.json()["error"]["message"]


def test_an_address_without_v1_says_what_the_base_url_is(call: Call):
    answer = call("POST", "/chat/completions", json=ask())
    assert answer.status_code == 404
    assert "ends in /v1" in answer.json()["error"]["message"]


def test_top_p_0_takes_the_likeliest_token_and_no_stop_texts_are_none(call: Call):
    greedy = content(call("POST", CHAT, json=ask(max_tokens=12)))
    assert content(call("POST", CHAT, json=ask(max_tokens=12, temperature=1, top_p=0))) == greedy
    assert content(call("POST", CHAT, json=ask(max_tokens=12, temperature=1, min_p=1))) == greedy
    assert content(call("POST", CHAT, json=ask(max_tokens=12, stop=[]))) == greedy


def test_calls_of_tools_in_the_history_are_text_of_their_turns(call: Call, loaded: LoadedModel):
    """As training data is read: a call is JSON in the reply, what a tool gave back is said by the user."""
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    as_tools = [*user("Hi"), {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "1", "content": "5"}, *user("and?")]  # fmt: skip
    as_text = [*user("Hi"), {"role": "assistant", "content": '{"name": "f", "arguments": {"x": 1}}'}, *user("5\nand?")]
    assert content(call("POST", CHAT, json=ask(messages=as_tools))) == content(
        call("POST", CHAT, json=ask(messages=as_text))
    )
    items = [{"role": "user", "content": "Hi"},
             {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
             {"type": "function_call_output", "call_id": "1", "output": "5"},
             {"role": "user", "content": "and?"}]  # fmt: skip
    body = {"model": "tiny", "input": items, "temperature": 0, "max_output_tokens": 4}
    answer = call("POST", "/v1/responses", json=body).json()
    assert answer["output"][0]["content"][0]["text"] == content(call("POST", CHAT, json=ask(messages=as_text)))


TOOLS = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}
    for name in ("get_current_timestamp", "calculate_timestamp", "ask_user")
]
# bodies of Open WebUI 0.12: its page, its tasks and its parameters; the words stand before the image
OPEN_WEBUI: dict[str, dict[str, Any]] = {
    "a chat, native tools by default": {"stream": True, "tools": TOOLS},
    "usage": {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}},
    "title task": {"stream": False, "max_tokens": 1000, "max_completion_tokens": None},
    "empty parameters": {"stream": True, "max_completion_tokens": None, "stop": None, "seed": None},
    "advanced parameters": {"stream": True, "frequency_penalty": 0, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1,
                            "mirostat": 0, "reasoning_effort": "low", "keep_alive": "5m", "num_ctx": 4096, "stop": []},
}  # fmt: skip
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "first question": [],
    "an answer without text": [{"role": "assistant", "content": ""}, {"role": "user", "content": "Which colour?"}],
    "continue": [{"role": "assistant", "content": "A red"}],
    "tools of another model": [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function",
                                                            "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "user", "content": "and?"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", OPEN_WEBUI)
def test_the_bodies_of_open_webui_are_answered(call: Call, image: Callable[[int], str], name: str, history: str):
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": image(0)}}]
    messages = [{"role": "user", "content": parts}, *HISTORIES[history]]
    body = {"model": "tiny", "messages": messages, "logit_bias": {"2": 100}} | OPEN_WEBUI[name]
    assert call("POST", CHAT, json={"max_tokens": 6} | body).status_code == 200
