"""Errors as OpenAI's API words them. Messages are our own text: what went wrong inside stays in the log."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """A request that gets an error instead of a reply.

    Args:
        status: of HTTP.
        code: short stable name, e.g. "context_length_exceeded".
        param: the field that is wrong.
        retry_after: seconds after which it may work.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def internal_error() -> ApiError:
    """For the client of a request that failed through no fault of its own."""
    return ApiError(500, "internal error; the log of the server says more", "internal_error")


def busy(message: str, retry_after: int = 2) -> ApiError:
    return ApiError(503, message, "overloaded", retry_after=retry_after)


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than the {seconds:g} seconds that the server allows", "timeout")
