"""What the routes share: the model and its thread, the places for requests, and one generation from start to end."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from vlm.apps.api.choice import ChoiceWriter, End, Event, Piece, TokenSpeller
from vlm.apps.api.constraint import JsonConstraint, JsonConstraints
from vlm.apps.api.errors import ApiError, busy, internal_error
from vlm.apps.api.fields import GenerationRequest
from vlm.apps.api.limits import Limits
from vlm.apps.api.media import MediaLoader
from vlm.apps.api.metrics import Metrics
from vlm.apps.api.parse import check_limits
from vlm.apps.api.prompt import Prompt, PromptBuilder, image_urls
from vlm.apps.api.scheduler import Job, Scheduler
from vlm.apps.api.schemas import ChatRequest
from vlm.apps.api.unread import Noted
from vlm.generation.batched import Reply, SharedPrompt
from vlm.generation.sampling import SamplingSettings
from vlm.inference.load import LoadedModel
from vlm.logs import log

_PREPARED_AT_ONCE = 2  # requests whose images are decoded at the same time; a large one takes 400 MB for a moment
_LOADED_AT_ONCE = 8  # images that are read from files or the web at the same time, before they are counted
_T = TypeVar("_T")


class Service:
    """One model behind the routes. Everything but `scheduler` belongs to the event loop."""

    def __init__(
        self, loaded: LoadedModel, name: str, scheduler: Scheduler, media: MediaLoader, metrics: Metrics, limits: Limits
    ) -> None:
        self.loaded = loaded
        self.name = name
        self.scheduler = scheduler
        self.media = media
        self.metrics = metrics
        self.limits = limits
        self.created = int(time.time())
        self.num_open = 0  # requests that came in and are not answered
        self.num_held = 0  # bytes of their bodies and images, until these are pixels
        self.draining = False
        self.generations: set[Generation] = set()
        self._preparing = asyncio.Semaphore(_PREPARED_AT_ONCE)
        self._loading = asyncio.Semaphore(_LOADED_AT_ONCE)
        self._speller = TokenSpeller(loaded.tokenizer, loaded.conversation_tokenizer.decode)
        self._constraints = JsonConstraints(loaded)
        self._noted = Noted()

    @property
    def status(self) -> str:
        if not self.scheduler.is_alive:
            return "failed"
        return "draining" if self.draining else "ok"

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place in the queue, taken before the body is read, so that waiting requests are few and small.

        Raises:
            ApiError: 503.
        """
        if self.draining:
            raise busy("this server is shutting down", retry_after=10)
        if not self.scheduler.is_alive:
            raise busy("the model has failed; the server must be started again", retry_after=60)
        if self.num_open >= self.limits.max_running + self.limits.max_queued:
            self.metrics.refused.inc()
            raise busy("too many requests wait; try again")
        place = Place(self)
        try:
            yield place
        finally:
            if not place.kept:
                place.leave()

    def cut(self) -> None:
        """End all replies now."""
        for generation in self.generations:
            generation.abort(busy("this server is shutting down", retry_after=10))

    async def start(
        self, request: GenerationRequest, hold: Callable[[int], None], where: str, form: str = "response_format"
    ) -> Generation:
        """Look at the images, and let the replies be written.

        Args:
            hold: told of the bytes of images that are no part of the body; may raise.
            where: the key that holds messages or prompts, for errors.
            form: the key that asks for a form of the reply, for errors.

        Raises:
            ApiError: 400 for what the request asks; 404 for a model that is not served; 502 for an image from
                elsewhere; 503 too much at a time.
        """
        self._check(request, where)
        images = [await self._load(url, hold, where) for url in image_urls(request)]
        async with self._preparing:
            build = PromptBuilder(self.loaded, self.scheduler.max_tokens, self.limits, where)
            prompts = await asyncio.to_thread(build, request, images)
            constraints = await asyncio.to_thread(self._constrain, request, prompts, form)
        self.metrics.images.inc(len(images))
        return Generation(self, request, prompts, constraints)

    def note(self, names: list[str]) -> None:
        """Tell the owner of the server what requests hold that is left out of account; each name once."""
        if fresh := self._noted.new(names):
            log(f"requests hold what this server does not use, and are answered without it: {', '.join(fresh)}")

    def _constrain(
        self, request: GenerationRequest, prompts: Sequence[Prompt], form: str
    ) -> Sequence[JsonConstraint | None]:
        """Per reply, what it must be."""
        count = (request.n or 1) * len(prompts)
        wanted = request.response_format if isinstance(request, ChatRequest) else None
        schema = None if wanted is None else wanted.schema_to_keep
        if schema is None:
            return [None] * count
        return self._constraints.build(schema, prompts[0].begun, count, form)

    async def _load(self, url: str, hold: Callable[[int], None], where: str) -> bytes:
        try:
            if url.startswith("data:"):  # was counted as it came in
                return await self.media.load(url)
            async with self._loading:
                image = await self.media.load(url)
        except ApiError as error:
            error.param = where
            raise
        hold(len(image))
        return image

    def _check(self, request: GenerationRequest, where: str) -> None:
        if request.model != self.name:
            raise unknown_model(self.name)
        check_limits(request, self.limits, where)
        vocabulary = self.loaded.model.llm.get_output_embeddings().weight.shape[0]
        for token in request.logit_bias or {}:
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocabulary):
                raise ApiError(400, "logit_bias: a key is no token id of this model", "invalid_request", "logit_bias")

    def writer(
        self, index: int, request: GenerationRequest, prompt: Prompt, post: Callable[[Event], None]
    ) -> ChoiceWriter:
        decode = self.loaded.conversation_tokenizer.decode
        speller = self._speller if request.num_logprobs is not None else None
        return ChoiceWriter(index, decode, request.stops, speller, post, self.explain, prompt.before)

    def explain(self, error: Exception) -> ApiError:
        """What a client is told; the log gets the rest."""
        self.metrics.failed.inc()
        log(f"a reply failed:\n{''.join(traceback.format_exception(error))}".rstrip())
        return internal_error()


class Place:
    """One of the requests that a server holds at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._left = False
        self._num_held = 0
        self.kept = False  # whoever keeps it calls `leave`
        service.num_open += 1

    def hold(self, num_bytes: int) -> None:
        """Count bytes of the request. Raises ApiError 503 when all requests together hold too many."""
        self._num_held += num_bytes
        self._service.num_held += num_bytes
        if self._service.num_held > self._service.limits.all_bodies_bytes:
            raise busy("other requests are too large at this moment; try again")

    def let_go(self) -> None:
        """The body has become tokens and pixels."""
        self._service.num_held -= self._num_held
        self._num_held = 0

    def leave(self) -> None:
        self.let_go()
        if not self._left:
            self._left = True
            self._service.num_open -= 1


class Generation:
    """The replies to one request, while they are written: `n` to the first prompt, then `n` to the next."""

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        prompts: Sequence[Prompt],
        constraints: Sequence[JsonConstraint | None],
    ) -> None:
        self.num_prompt_tokens = sum(len(prompt.input_ids) for prompt in prompts)
        self.num_new_tokens = 0
        self._started = time.monotonic()
        self._service = service
        self._open = len(constraints)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._job = Job(self._replies(request, prompts, constraints))
        service.metrics.prompt_tokens.inc(self.num_prompt_tokens)
        service.generations.add(self)
        service.scheduler.submit(self._job)

    def _replies(
        self, request: GenerationRequest, prompts: Sequence[Prompt], constraints: Sequence[JsonConstraint | None]
    ) -> list[Reply]:
        stop_ids = self._service.loaded.conversation_tokenizer.stop_ids
        count = request.n or 1
        shared = [SharedPrompt() for _ in prompts]
        replies = []
        for index, constraint in enumerate(constraints):
            prompt = prompts[index // count]
            writer = self._service.writer(index, request, prompt, self._post)
            replies.append(
                Reply(
                    prompt.input_ids,
                    prompt.pixel_values,
                    prompt.max_new_tokens,
                    stop_ids,
                    sampling_settings(request, index % count),
                    writer.on_token,
                    writer.on_end,
                    shared[index // count],
                    constraint,
                )
            )
        return replies

    async def events(self) -> AsyncIterator[Event]:
        """Pieces and ends as they come.

        Raises:
            ApiError: a reply could not be written.
        """
        is_first = True
        while self._open:
            event = await self._events.get()
            if is_first and isinstance(event, Piece):
                is_first = False
                self._service.metrics.first_token.observe(time.monotonic() - self._started)
            if isinstance(event, End):
                self._open -= 1
                self.num_new_tokens += event.num_tokens
                self._service.metrics.new_tokens.inc(event.num_tokens)
                if isinstance(event.reason, ApiError):
                    raise event.reason
            yield event

    def abort(self, error: ApiError) -> None:
        """Answer with an error instead of the rest. Called in the event loop."""
        self._events.put_nowait(End(0, 0, error))

    def close(self) -> None:
        """Stop what is still being written. Its slots are free after the next token."""
        self._service.generations.discard(self)
        if self._open:
            self._open = 0
            self._service.scheduler.cancel(self._job)

    def _post(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and nobody listens
            return


def sampling_settings(request: GenerationRequest, choice: int) -> SamplingSettings:
    """Of choice number `choice`: with a seed, each of several choices has its own."""
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty or request.repeat_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
    }
    settings: dict[str, Any] = {"temperature": 1.0} | {key: value for key, value in given.items() if value is not None}
    return SamplingSettings(
        **settings,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        seed=None if request.seed is None else (request.seed + choice) & ((1 << 63) - 1),
        num_logprobs=request.num_logprobs,
    )


def unknown_model(served: str) -> ApiError:
    return ApiError(404, f"this server has no such model; it serves {served}", "model_not_found", "model")


async def first_of(work: Awaitable[_T], left: Awaitable[Any], deadline: float) -> _T | None:
    """The result of `work`; None if `left`, the client's leaving, comes first.

    Raises:
        TimeoutError: at `deadline`, a time of the event loop.
    """
    tasks: Sequence[asyncio.Future[Any]] = (asyncio.ensure_future(work), asyncio.ensure_future(left))
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
