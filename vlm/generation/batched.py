"""Many replies at once: continuous batching. Replies join and leave between two tokens of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vlm.generation.sampling import Constraint, NewToken, Sampler, SamplingSettings
from vlm.generation.slot_cache import CELLS, Decoder, build_decoder, round_up
from vlm.models.vlm import VisionLanguageModel

EndReason = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class SharedPrompt:
    """What replies to the same prompt have in common, so that its images and tokens are read once.

    It is filled when the first starts, and emptied when none waits any more.
    """

    embeddings: Tensor | None = None  # [1, Q, D]
    logits: Tensor | None = None  # float32 [V], after its last token

    def forget(self) -> None:
        self.embeddings = self.logits = None


@dataclass(eq=False)
class Reply:
    """One reply to be written, and where to hand its tokens.

    Args:
        input_ids: the prompt, placeholders included.
        pixel_values: [N, 3, S, S] of its images; None without images.
        max_new_tokens: the stop token not counted.
        stop_ids: tokens that end it and are not part of it.
        on_token: sees each token at once; False ends the reply.
        on_end: called once, with the reason, or with what went wrong.
        shared: the same one for several replies with this prompt.
        constraint: what the reply may be; of this reply alone.
    """

    input_ids: list[int]
    pixel_values: Tensor | None
    max_new_tokens: int
    stop_ids: Collection[int]
    settings: SamplingSettings
    on_token: Callable[[NewToken], bool]
    on_end: Callable[[EndReason | Exception], None]
    shared: SharedPrompt = field(default_factory=SharedPrompt)
    constraint: Constraint | None = None
    new_ids: list[int] = field(default_factory=list, init=False)
    num_cached: int = field(default=0, init=False)  # tokens whose keys and values are in the cache
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.settings, self.constraint)

    @property
    def num_reserved(self) -> int:
        """Tokens that it may come to."""
        return round_up(len(self.input_ids) + self.max_new_tokens)


class NotFinite(RuntimeError):
    """The model computed logits that are no numbers."""


class BatchedGenerator:
    """Writes replies, all in one batch. Not thread-safe: one thread calls everything.

    The cache is a rectangle: as many slots as replies, each as long as the longest may come to. A reply starts when the
    rectangle with it is within the budget; the first to wait is the first to start.

    Args:
        max_running: replies written at the same time.
        max_tokens: budget of the rectangle, in tokens; rounded down to a multiple of 64, as slots grow by that.
        prefill_tokens: prompt tokens read between two tokens of the running replies, so that a long prompt does not
            stop them.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        max_running: int = 8,
        max_tokens: int = 8192,
        prefill_tokens: int = 512,
        decoder: Decoder | None = None,
    ) -> None:
        self.model = model.eval()
        self.max_running = max_running
        self.max_tokens = max_tokens // CELLS * CELLS
        self.prefill_tokens = prefill_tokens
        self.decoder = decoder or build_decoder(model)
        self.waiting: deque[Reply] = deque()
        self.running: list[Reply] = []  # the n-th is in slot n
        self._prompt: Tensor | None = None  # embeddings of the reply that is being read; it is the last of `running`

    @property
    def num_reserved(self) -> int:
        """Tokens of the budget that memory is taken for."""
        return self.decoder.num_reserved

    def fits(self, reply: Reply) -> bool:
        """Whether it could ever start."""
        return reply.num_reserved <= self.max_tokens

    def add(self, reply: Reply) -> None:
        """Let a reply wait for its place.

        Raises:
            ValueError: it alone is larger than the budget.
        """
        if not self.fits(reply):
            raise ValueError(f"a reply of up to {reply.num_reserved} tokens, the budget is {self.max_tokens}")
        self.waiting.append(reply)

    def cancel(self, reply: Reply) -> None:
        """Take a reply out, wherever it is. Nothing happens if it has ended."""
        if reply in self.waiting:
            self.waiting.remove(reply)
            reply.on_end("cancelled")
        elif reply in self.running:
            self._end(reply, "cancelled")

    def fail_all(self, error: Exception) -> None:
        """End all replies, and start with an empty cache."""
        ended = [*self.running, *self.waiting]
        self.running, self._prompt = [], None
        self.waiting.clear()
        self.decoder.release()
        for reply in ended:
            reply.on_end(error)

    @torch.no_grad()
    def step(self) -> bool:
        """Read some of the waiting prompts, then write one token of every reply whose prompt is read.

        An error in one reply ends that one only.

        Returns:
            whether there is more to do.
        """
        self._read_prompts()
        self._write_tokens()
        if not self.running and not self.waiting:
            self.decoder.release()
        return bool(self.running or self.waiting)

    def _read_prompts(self) -> None:
        left = self.prefill_tokens
        while left > 0:
            if self._prompt is None and not self._start_next():
                return
            if self._prompt is not None:
                left -= self._read_some(left)

    def _start_next(self) -> bool:
        """Give the first reply that waits a slot, if it fits, and look at its images."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        reply = self.waiting[0]
        num_slots, num_cells = len(self.running) + 1, max(one.num_reserved for one in (*self.running, reply))
        if num_slots * num_cells > self.max_tokens:
            return False
        self.waiting.popleft()
        shared = reply.shared
        try:
            self.decoder.reserve(num_slots, num_cells, self.max_tokens)
            if shared.embeddings is None:
                shared.embeddings = self._embed(reply.input_ids, reply.pixel_values)
            is_read = self._copy_prompt(reply)
        except Exception as error:  # the reply runs only once it has its slot
            self.decoder.clear(len(self.running))
            reply.on_end(error)
        else:
            self.running.append(reply)
            if is_read and shared.logits is not None:
                reply.num_cached = len(reply.input_ids)
                self._try_to_choose(reply, shared.logits)
            else:
                self._prompt = shared.embeddings
        reply.pixel_values = None
        if not self._is_awaited(shared):
            shared.forget()
        return True

    def _copy_prompt(self, reply: Reply) -> bool:
        """Put its prompt into the next slot, if a reply that runs has the same."""
        source = next((slot for slot, running in enumerate(self.running) if running.shared is reply.shared), None)
        return source is not None and self.decoder.copy(source, len(self.running), len(reply.input_ids))

    def _is_awaited(self, shared: SharedPrompt) -> bool:
        return any(waiting.shared is shared for waiting in self.waiting)

    def _read_some(self, limit: int) -> int:
        """Feed at most `limit` tokens of the prompt that is being read; returns how many were."""
        assert self._prompt is not None
        reply, slot = self.running[-1], len(self.running) - 1
        chunk = self._prompt[:, reply.num_cached : reply.num_cached + limit]
        count = chunk.shape[1]
        try:
            hidden_state = self.decoder.prefill(chunk, slot, reply.num_cached)
            reply.num_cached += count
            if reply.num_cached == len(reply.input_ids):
                self._prompt = None
                logits = self.model.logits(hidden_state)[0].float()
                if self._is_awaited(reply.shared):
                    reply.shared.logits = logits
                self._choose(reply, logits)
        except Exception as error:
            self._end(reply, error)
        return count

    def _write_tokens(self) -> None:
        replies = self.running if self._prompt is None else self.running[:-1]
        replies = list(replies)
        if not replies:
            return
        if self.decoder.rows_at_once and len(replies) > 1:
            try:
                logits = self._decode(replies, first_slot=0)
            except Exception:  # whose fault it is shows when each is tried alone; the same cells are written again
                self._write_each(replies)
                return
            for reply, row in zip(replies, logits, strict=True):
                self._try_to_choose(reply, row)
        else:
            self._write_each(replies)

    def _write_each(self, replies: list[Reply]) -> None:
        for reply in replies:
            try:
                row = self._decode([reply], first_slot=self.running.index(reply))[0]
            except Exception as error:
                self._end(reply, error)
            else:
                self._try_to_choose(reply, row)

    def _decode(self, replies: list[Reply], first_slot: int) -> Tensor:
        """Logits [B, V] after the last token of each, float32."""
        ids = torch.tensor([[reply.new_ids[-1]] for reply in replies], device=self.model.llm.device)
        lengths = [len(reply.input_ids) + len(reply.new_ids) - 1 for reply in replies]
        embeddings = self.model.embed(ids)
        return self.model.logits(self.decoder.decode(embeddings, lengths, first_slot)).float()

    def _try_to_choose(self, reply: Reply, logits: Tensor) -> None:
        """`_choose` from logits float32 [V]; an error ends this reply alone."""
        try:
            self._choose(reply, logits)
        except Exception as error:
            self._end(reply, error)

    def _choose(self, reply: Reply, logits: Tensor) -> None:
        """Choose the next token of a reply from logits float32 [V], hand it on, and end the reply if it is the last."""
        if not torch.isfinite(logits).all():
            raise NotFinite("logits are not finite")
        token = reply.sampler.choose(logits, reply.new_ids)
        if token.id in reply.stop_ids:
            self._end(reply, "stop")
            return
        reply.new_ids.append(token.id)
        if not reply.on_token(token):
            self._end(reply, "stop")
        elif len(reply.new_ids) >= reply.max_new_tokens:
            self._end(reply, "length")

    def _end(self, reply: Reply, reason: EndReason | Exception) -> None:
        """Free its slot. Others move up, so that slots in use stay side by side and the prompt that is read is last."""
        hole, last = self.running.index(reply), len(self.running) - 1
        self.decoder.clear(hole)
        if self._prompt is not None and hole < last - 1:
            hole = self._fill(hole, last - 1)
        if hole == last:
            self._prompt = None
        else:
            self._fill(hole, last)
        self.running.pop()
        reply.on_end(reason)

    def _fill(self, hole: int, source: int) -> int:
        """Move a reply into an empty slot; returns the slot that is empty now."""
        self.decoder.move(source, hole)
        self.running[hole] = self.running[source]
        return source

    def _embed(self, input_ids: list[int], pixel_values: Tensor | None) -> Tensor:
        """A prompt of l tokens and pixels [N, 3, S, S] of its images -> [1, l, D]."""
        ids = torch.tensor([input_ids], device=self.model.llm.device)
        features = None if pixel_values is None else self.model.encode_images(pixel_values.to(ids.device))
        return self.model.embed(ids, features)
