"""A form that a reply must have, as a JSON schema -> which tokens may come next, by the library llguidance."""

from __future__ import annotations

import importlib.util
import json
import threading
from typing import Any

import torch
from torch import Tensor

from vlm.apps.api.errors import ApiError
from vlm.inference.load import LoadedModel

# Between values a blank at most: without a bound a small model writes blanks without end.
_OPTIONS: Any = {"whitespace_flexible": False, "whitespace_pattern": "[ ]?", "lenient": False}
_LONGEST_SCHEMA = 1 << 15  # characters of JSON; building a grammar takes the square of it: 32 KiB are some 3 s


class JsonConstraint:
    """The rest of one reply. See `vlm.generation.sampling.Constraint`.

    Args:
        num_tokens: V, the logits of the model.
    """

    def __init__(self, matcher: Any, num_tokens: int) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens

    def allowed(self) -> Tensor:
        """bool [V] on the CPU: the tokens that the schema allows next."""
        mask = (
            torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: self._num_tokens] > 0
        )
        if self._matcher.is_error() or not mask.any():
            raise RuntimeError(f"no token fits the schema: {self._matcher.get_error() or 'none is left'}")
        return mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)  # a token that does not fit shows at the next `allowed`


class JsonConstraints:
    """Makes constraints for one model. May be called from several threads.

    The end tokens of its template are what ends a reply that is whole.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._num_tokens: int = loaded.model.llm.get_output_embeddings().weight.shape[0]
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def build(self, schema: dict[str, Any], begun: str, count: int, param: str) -> list[JsonConstraint]:
        """Constraints of `count` replies.

        Args:
            begun: text that the replies go on with; the beginning of the JSON.
            param: the field that asks for it, for errors.

        Raises:
            ApiError: 400 a schema that cannot be kept to, or a begun reply that does not fit it; or the package is
                missing here.
        """
        if importlib.util.find_spec("llguidance") is None:
            advice = "the server needs the package llguidance for it: pip install 'vlm[json]'"
            raise ApiError(400, f"{param}: {advice}", "unsupported", param)
        from llguidance import LLMatcher

        text = json.dumps(schema, ensure_ascii=False)
        if len(text) > _LONGEST_SCHEMA:
            raise _bad(param, f"has {len(text):,} characters as JSON, at most {_LONGEST_SCHEMA:,}")
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
        matcher = LLMatcher(self._tokens(), grammar, log_level=0)
        if matcher.is_error():
            raise _bad(param, f"cannot be kept to: {matcher.get_error()[:200]}")
        if begun and not matcher.consume_tokens(self._tokens().tokenize_str(begun)):
            raise ApiError(400, "messages: the begun reply does not fit the schema", "invalid_request", "messages")
        return [JsonConstraint(matcher.deep_copy(), self._num_tokens) for _ in range(count)]

    def _tokens(self) -> Any:
        """The vocabulary as llguidance reads it; made once, as it takes a second for 150,000 tokens."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                loaded = self._loaded
                # the mark of images may stand beyond the logits, rows of padding beyond the tokenizer
                size = max(self._num_tokens, len(loaded.tokenizer))
                ends = sorted(loaded.conversation_tokenizer.stop_ids)
                backend = loaded.tokenizer.backend_tokenizer.to_str()
                try:
                    self._tokenizer = LLTokenizer(backend, n_vocab=size, eos_token=ends)
                except ValueError as error:
                    message = f"this model's tokenizer cannot be used for JSON ({str(error)[:100]})"
                    raise ApiError(400, message, "unsupported", "response_format") from None
            return self._tokenizer


def _bad(param: str, problem: str) -> ApiError:
    return ApiError(400, f"{param}: the schema {problem}", "invalid_request", param)
