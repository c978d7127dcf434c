"""What the server counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.apps.api.scheduler import Scheduler

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GENERATE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PATHS = (*_GENERATE, "/v1/models", "/health", "/metrics", "/docs", "/openapi.json")


class Metrics:
    """Counters of one server. Labels take few values: paths that do not exist are one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("vlm_requests", "Requests answered.", "path", "status")
        self.prompt_tokens = self._counter("vlm_prompt_tokens", "Tokens of prompts, images included.")
        self.new_tokens = self._counter("vlm_generated_tokens", "Tokens written.")
        self.images = self._counter("vlm_images", "Images looked at.")
        self.cancelled = self._counter("vlm_cancelled", "Requests whose client left before the end.")
        self.refused = self._counter("vlm_queue_full", "Requests sent away because too many waited.")
        self.failed = self._counter("vlm_failed", "Requests that ended with an error of the model or the server.")
        self.first_token = self._histogram(
            "vlm_first_token_seconds", "From a prompt that is ready to the first piece of its reply."
        )
        self.seconds = self._histogram("vlm_request_seconds", "From a request to the end of its reply.")
        for name, text, read in (
            ("vlm_running", "Replies that are being written.", lambda: scheduler.num_running),
            ("vlm_waiting", "Replies that wait for a place.", lambda: scheduler.num_waiting),
            ("vlm_cache_tokens", "Tokens of the cache in use.", lambda: scheduler.num_reserved),
            ("vlm_cache_tokens_limit", "Tokens of the cache.", lambda: scheduler.max_tokens),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)


class CountRequests:
    """Middleware: counts every answer by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"  # the client left before there was one
        started = time.monotonic()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:  # of our own code; what answers it stands outside
            self._metrics.failed.inc()
            status = "500"
            raise
        finally:
            path = next((path for path in PATHS if scope["path"].startswith(path)), "other")
            self._metrics.requests.labels(path, status).inc()
            if path in _GENERATE:
                self._metrics.seconds.observe(time.monotonic() - started)
