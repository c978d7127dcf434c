"""Messages or texts of a request -> what the model reads: token ids and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.apps.api.errors import ApiError
from vlm.apps.api.fields import GenerationRequest
from vlm.apps.api.limits import Limits
from vlm.apps.api.schemas import AssistantMessage, ChatRequest, ImagePart, Message, RefusalPart
from vlm.apps.api.text_schemas import TextRequest
from vlm.data.images import FORMATS, load_image, to_tiles
from vlm.data.template import BOS
from vlm.errors import RecordError
from vlm.generation.streaming import CONTEXT
from vlm.inference.load import LoadedModel
from vlm.inference.messages import to_conversation

_ROLES = {"developer": "system", "tool": "user", "function": "user"}  # as training data is read
_LONGEST_TOKEN = 64  # characters a token may stand for on average; long runs of blanks come near it


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        before: the last tokens of a text that the reply goes on with; none before a reply of its own.
        begun: text of the reply that the prompt holds already.
    """

    input_ids: list[int]
    pixel_values: Tensor | None  # [N, 3, S, S]
    max_new_tokens: int
    before: tuple[int, ...] = ()
    begun: str = ""


@dataclass(frozen=True)
class PromptBuilder:
    """
    Args:
        max_tokens: longest prompt and reply together that the server can hold.
        where: the key of the request that holds messages or prompts, for errors.
    """

    loaded: LoadedModel
    max_tokens: int
    limits: Limits
    where: str

    @property
    def longest(self) -> int:
        return min(self.max_tokens, self.loaded.max_tokens)

    def __call__(self, request: GenerationRequest, images: Sequence[bytes]) -> list[Prompt]:
        """One prompt of a chat, or those of a plain completion.

        Args:
            images: what `image_urls` name.

        Raises:
            ApiError: 400 an order of turns that the template cannot write, an image that cannot be read, token ids
                that are none, or too long.
        """
        if images and self.loaded.image_spec is None:
            raise self._bad("this model reads no images", "images_not_supported")
        wanted = request.new_tokens
        if wanted is not None and wanted > self.longest:
            raise ApiError(400, f"max_tokens is {wanted:,}, at most {self.longest:,} here", "too_many", "max_tokens")
        if isinstance(request, TextRequest):
            return [self._of_text(prompt, wanted) for prompt in request.prompt]
        assert isinstance(request, ChatRequest)
        return [self._of_chat(request, images)]

    def _of_chat(self, request: ChatRequest, images: Sequence[bytes]) -> Prompt:
        messages = _merged(request.messages)
        self._check_letters(sum(len(part.get("text", "")) for message in messages for part in message["content"]))
        spec = self.loaded.image_spec
        # before the text where its length depends on them, so that one which cannot be read is named as such
        pixels = self._pixels(images) if spec is not None and spec.reads_size else None
        try:
            conversation = to_conversation(messages, images, self.loaded.template)
            input_ids = self.loaded.conversation_tokenizer.prompt(conversation)
        except RecordError as error:  # about turns only
            raise self._bad(f"{self.where}: {error.message}", error.rule) from None
        new_tokens = self._new_tokens(input_ids, request.new_tokens, len(images))
        begun = conversation.begun_reply
        before = tuple(input_ids[-CONTEXT:]) if begun else ()
        pixels = self._pixels(images) if pixels is None else pixels
        return Prompt(input_ids, pixels, new_tokens, before, begun)

    def _of_text(self, prompt: str | list[int], wanted: int | None) -> Prompt:
        if isinstance(prompt, str):
            self._check_letters(len(prompt))
            input_ids = self._tokenize(prompt)
        else:
            input_ids = prompt
            vocabulary = self.loaded.model.llm.get_input_embeddings().weight.shape[0]
            if len(prompt) < self.longest and max(prompt) >= vocabulary:
                raise self._bad(f"{self.where}: {max(prompt)} is not a token id of this model", "invalid_request")
        if self.loaded.image_token_id in input_ids:
            raise self._bad(f"{self.where}: holds the place of an image; ask about images in a chat", "image_count")
        if not input_ids:
            raise self._bad(f"{self.where}: a prompt is empty", "invalid_request")
        new_tokens = self._new_tokens(input_ids, wanted, 0)
        return Prompt(input_ids, None, new_tokens, tuple(input_ids[-CONTEXT:]))

    def _tokenize(self, text: str) -> list[int]:
        """A text with its control words, after one begin token where the prompts of this model have one."""
        begin = self.loaded.conversation_tokenizer.special_texts[BOS]
        whole = text if text.startswith(begin) else begin + text
        ids: list[int] = self.loaded.tokenizer(whole, add_special_tokens=False).input_ids if text else []
        return ids

    def _new_tokens(self, input_ids: list[int], wanted: int | None, num_images: int) -> int:
        if len(input_ids) >= self.longest:
            shown = f" ({num_images} images included)" if num_images else ""
            raise self._too_long(f"has {len(input_ids):,} tokens{shown}")
        return min(wanted or self.limits.default_new_tokens, self.longest - len(input_ids))

    def _check_letters(self, num_letters: int) -> None:
        if num_letters > _LONGEST_TOKEN * self.longest:  # not worth tokenizing
            raise self._too_long(f"has {num_letters:,} characters")

    def _pixels(self, images: Sequence[bytes]) -> Tensor | None:
        """float32 [tiles, 3, S, S] of the tiles of all images, in order; None without images."""
        spec, most = self.loaded.image_spec, self.limits.max_pixels
        if not images or spec is None:
            return None
        pixels = []
        for number, image in enumerate(images, 1):
            try:
                pixels.append(to_tiles(load_image(image, most, spec.background), spec))
            except RecordError as error:  # its text may quote the decoder
                if error.rule == "image_too_large":
                    message = f"has more than {most:,} pixels"
                else:
                    message = f"cannot be read: it is damaged, or none of {', '.join(FORMATS)}"
                raise self._bad(f"image_url: image {number} {message}", error.rule) from None
        return torch.cat(pixels)

    def _too_long(self, what: str) -> ApiError:
        message = f"the conversation {what}; this server takes at most {self.longest:,} tokens, with the reply"
        return self._bad(message, "context_length_exceeded")

    def _bad(self, message: str, code: str) -> ApiError:
        return ApiError(400, message, code, self.where)


def image_urls(request: GenerationRequest) -> list[str]:
    """In the order in which the images are shown."""
    messages = request.messages if isinstance(request, ChatRequest) else ()
    return [part.image_url.url for message in messages for part in message.content or () if isinstance(part, ImagePart)]


def _merged(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as `to_conversation` takes them: system messages in a row as one, and users in a row too."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        role = _ROLES.get(message.role, message.role)
        parts = _parts(message)
        if role == "system" and not any(part["text"].strip() for part in parts):
            continue
        if merged and merged[-1]["role"] == role and role != "assistant":
            merged[-1]["content"] += [{"type": "text", "text": "\n"}, *parts]
        else:
            merged.append({"role": role, "content": parts})
    return merged


def _parts(message: Message) -> list[dict[str, Any]]:
    parts = [
        {"type": "image"}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.refusal if isinstance(part, RefusalPart) else part.text}
        for part in message.content or ()
    ]
    if isinstance(message, AssistantMessage):
        if message.refusal and not parts:
            parts = [{"type": "text", "text": message.refusal}]
        said = any(part["text"] for part in parts)
        calls = "\n".join(call.text for call in message.calls)
        parts += [{"type": "text", "text": f"\n{calls}" if said else calls}] if calls else []
    return parts
