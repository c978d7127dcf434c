"""Replies of a form that was asked for: a schema is kept to whatever the model would rather say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from api_server import NAME, ask, user
from tokenizers_for_tests import byte_level_bpe, sentencepiece_model

from vlm.apps.api.constraint import JsonConstraints
from vlm.apps.api.errors import ApiError
from vlm.inference.load import LoadedModel
from vlm.models.llm import load_tokenizer

CHAT = "/v1/chat/completions"
Call = Callable[..., httpx.Response]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sides": {"type": "integer"}},
    "required": ["colour", "sides"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True}}


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text[:400]
    return str(response.json()["choices"][0]["message"]["content"])


def check_shape(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"colour", "sides"}
    assert value["colour"] in ("red", "green")
    assert isinstance(value["sides"], int)


def test_a_reply_keeps_to_the_schema_and_ends_when_it_is_whole(call: Call):
    answer = call("POST", CHAT, json=ask(response_format=FORM, max_tokens=200))
    check_shape(content(answer))
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_where_llama_cpp_has_it_is_kept_to(call: Call, kind: str):
    form = {"type": kind, "schema": SCHEMA}
    check_shape(content(call("POST", CHAT, json=ask(response_format=form, max_tokens=200))))


def test_each_of_several_sampled_choices_keeps_to_it_in_its_own_way(call: Call):
    body = ask(response_format=FORM, max_tokens=200, temperature=2, n=4, seed=1)
    choices = call("POST", CHAT, json=body).json()["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    for text in texts:
        check_shape(text)
    assert len(set(texts)) > 1


def test_any_object_is_one(call: Call, loaded: LoadedModel):
    ends = {str(loaded.tokenizer.convert_tokens_to_ids("}")): 100}  # else this model, which is random, goes on and on
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}):
        text = content(call("POST", CHAT, json=ask(response_format=form, max_tokens=200, logit_bias=ends)))
        assert isinstance(json.loads(text), dict)


def test_plain_text_is_not_bound(call: Call):
    assert content(call("POST", CHAT, json=ask(response_format={"type": "text"}))) == content(
        call("POST", CHAT, json=ask())
    )


def test_a_begun_reply_is_the_beginning_of_the_json(call: Call):
    begun = '{"colour": "red"'
    messages = [*user("What is this?"), {"role": "assistant", "content": begun}]
    rest = content(call("POST", CHAT, json=ask(messages=messages, response_format=FORM, max_tokens=200)))
    check_shape(begun + rest)
    messages[-1]["content"] = "A red"
    answer = call("POST", CHAT, json=ask(messages=messages, response_format=FORM))
    assert answer.status_code == 400
    assert "does not fit the schema" in answer.json()["error"]["message"]


def test_a_response_asks_for_it_under_text_format(call: Call):
    form = {"format": {"type": "json_schema", "name": "shape", "schema": SCHEMA, "strict": True}}
    body: dict[str, Any] = {"model": NAME, "input": "What is this?", "temperature": 0, "max_output_tokens": 200}
    answer = call("POST", "/v1/responses", json=body | {"text": form}).json()
    check_shape(answer["output"][0]["content"][0]["text"])
    assert answer["text"] == form
    bad = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}
    error = call("POST", "/v1/responses", json=body | {"text": bad}).json()["error"]
    assert (error["param"], error["code"]) == ("text.format", "invalid_request")
    assert "Invalid type: nothing" in error["message"]


HOSTILE: dict[str, dict[str, Any]] = {
    "a file": {"$ref": "file:///etc/passwd"},
    "the web": {"$ref": "https://example.com/schema"},
    "nowhere": {"$ref": "#/$defs/none"},
    "not": {"not": {"type": "string"}},
    "no pattern": {"type": "string", "pattern": "(("},
    "5,000 properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}},
    "options of the library": {"type": "string", "pattern": "((", "x-guidance": {"lenient": True}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_that_cannot_be_kept_to_is_refused_and_nothing_is_fetched(loaded: LoadedModel, name: str):
    with pytest.raises(ApiError) as caught:
        JsonConstraints(loaded).build(HOSTILE[name], "", 1, "response_format")
    assert (caught.value.status, caught.value.param) == (400, "response_format")
    assert len(caught.value.message) < 300


def test_without_the_package_the_error_names_the_extra(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llguidance" else find(name))
    with pytest.raises(ApiError, match=r"pip install 'vlm\[json\]'"):
        JsonConstraints(loaded).build(SCHEMA, "", 1, "response_format")


def spelled_by(kind: str, folder: Path) -> Any:
    """A tokenizer whose vocabulary spells bytes as GPT-2's, or as SentencePiece does."""
    if kind == "bytes":
        return byte_level_bpe()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(kind))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_each_kind_of_vocabulary_spells_it(loaded: LoadedModel, tmp_path: Path, kind: str):
    """A walk over allowed tokens, the longest first, ends in JSON of the schema."""
    tokenizer = spelled_by(kind, tmp_path)
    end = tokenizer.eos_token_id
    like: Any = SimpleNamespace(stop_ids={end})
    constraints = JsonConstraints(replace(loaded, tokenizer=tokenizer, conversation_tokenizer=like))
    constraints._num_tokens = len(tokenizer)
    (one,) = constraints.build({"enum": [{"colour": "red", "sides": 4}]}, "", 1, "response_format")
    ids: list[int] = []
    while True:
        allowed = one.allowed().nonzero().flatten().tolist()
        token = max(allowed, key=lambda i: len(tokenizer.convert_ids_to_tokens(i)) * (i != end))
        if token == end:
            break
        one.accept(token)
        ids.append(token)
    assert json.loads(tokenizer.decode(ids)) == {"colour": "red", "sides": 4}
