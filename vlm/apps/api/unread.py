"""Keys of a request that this server does not use: those that may be left out of account, and those that may not.

A key that no schema has is either refused, because a reply without it would be a wrong answer (it holds content, or
asks for a form that the client then counts on), or left out of account. The client is told of the latter in a header,
the owner of the server in its log.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from vlm.apps.api.errors import ApiError

HEADER = "X-Ignored-Fields"
_MOST = 32  # names in one header
_MOST_LOGGED = 256  # names that one server logs, each once
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")  # what may stand in a header or a log


def _nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_free_choice(value: Any) -> bool:
    """A tool choice that lets the model answer with text."""
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        inner = value.get("allowed_tools")
        return (inner if isinstance(inner, dict) else value).get("mode") == "auto"
    value = value["type"] if isinstance(value, dict) and list(value) == ["type"] else value
    return value in (None, "", "none", "auto")


_TEXT_ONLY = "this server answers with text only; leave it out"
_NO_CALL = "this server's models call no tools: only none and auto can be chosen, and tools are left out of account"
_FORM = "ask for a form with response_format (text.format in /v1/responses)"
_CONTENT = "what it holds would not be read; put text and images into the messages"
_STATE = "this server stores nothing; send the whole conversation"

# Refused in every request, unless the value asks for nothing: name -> (the values that ask for nothing, what to do)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tool_choice": (_is_free_choice, _NO_CALL),
    "function_call": (_is_free_choice, _NO_CALL),
    "audio": (_nothing, _TEXT_ONLY),
    "modalities": (lambda value: value in (None, [], ["text"]), _TEXT_ONLY),
    "web_search_options": (_nothing, _TEXT_ONLY),
    "moderation": (_nothing, "this server judges no content; leave it out"),
    "best_of": (lambda value: value in (None, 1), "replies are not compared; ask for n of them"),
    "use_beam_search": (_nothing, "this server writes no beams; leave it out"),
    "prompt_logprobs": (_nothing, "log-probabilities are those of the reply; leave it out"),
    "suffix": (_nothing, "text is only gone on with at its end; leave it out"),
    "background": (_nothing, _STATE),
    "conversation": (_nothing, _STATE),
    "previous_response_id": (_nothing, _STATE),
    **dict.fromkeys(("documents", "images", "files", "system", "data_sources", "prompt_embeds"), (_nothing, _CONTENT)),
    # how vLLM, SGLang, llama.cpp and Ollama ask for a form
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "json_schema",
         "regex", "ebnf", "grammar", "format"),
        (_nothing, _FORM),
    ),
}  # fmt: skip
# Keys that one route reads and another one does not: name -> the route's own key
ELSEWHERE = {
    "messages": "messages are for /v1/chat/completions",
    "prompt": "prompt is for /v1/completions",
    "input": "input is for /v1/responses",
    "response_format": _FORM,
    "text": _FORM,
    "instructions": "put the system text into a system message",
}
# Within a message or an item: what the reply would be about
REFUSED_IN_MESSAGES = dict.fromkeys(("audio", "images", "files", "attachments", "experimental_attachments"), _CONTENT)


def refuse_unsupported(value: dict[str, Any], fields: Iterable[str]) -> None:
    """
    Args:
        value: the body of a request.
        fields: keys that its route reads.

    Raises:
        ApiError: 400, naming the first key that may not be left out of account.
    """
    for name, (asks_for_nothing, advice) in REFUSED.items():
        if name in value and name not in fields and not asks_for_nothing(value[name]):
            raise ApiError(400, f"{name} is not supported by this server: {advice}", "unsupported", name)
    for name, advice in ELSEWHERE.items():
        if name not in fields and not _nothing(value.get(name)):
            raise ApiError(400, f"{name} is not read here: {advice}", "unsupported", name)
    for key in ("messages", "input"):
        for number, message in enumerate(value[key] if isinstance(value.get(key), list) else ()):
            _refuse_in_message(message, key, number)


def _refuse_in_message(message: Any, key: str, number: int) -> None:
    for name, advice in REFUSED_IN_MESSAGES.items():
        if isinstance(message, dict) and not _nothing(message.get(name)):
            raise ApiError(400, f"{key}[{number}].{name} is not supported: {advice}", "unsupported", key)


def unread_keys(request: BaseModel) -> list[str]:
    """Places of the keys that no field took and that ask for something, e.g. `keep_alive`, `messages[].name`."""
    return list(dict.fromkeys(_unread(request, "")))


def header_value(names: list[str]) -> str:
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f", and {more} more" if more > 0 else "")


class Noted:
    """Names that a server has logged: each once, and not without end."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def new(self, names: list[str]) -> list[str]:
        """Those of `names` that were not seen before."""
        fresh = [name for name in names if name not in self._names][: _MOST_LOGGED - len(self._names)]
        self._names.update(fresh)
        return fresh


def _unread(model: BaseModel, place: str) -> Iterator[str]:
    for name, value in (model.model_extra or {}).items():
        asks_for_nothing = REFUSED[name][0] if name in REFUSED and not place else _nothing
        if _NAME.fullmatch(name) and not asks_for_nothing(value):
            yield place + name
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else ():
            if isinstance(item, BaseModel):
                yield from _unread(item, f"{place}{name}[].")
        if isinstance(value, BaseModel):
            yield from _unread(value, f"{place}{name}.")
