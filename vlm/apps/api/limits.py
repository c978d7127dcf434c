"""What one server allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on requests. Each keeps a stranger from taking memory or time without end."""

    max_running: int = 8  # replies written at the same time
    max_queued: int = 32  # requests that wait beside them; more are sent away with 503
    max_tokens: int = 0  # of keys and values of all running replies; 0 fits it to the memory
    default_new_tokens: int = 512  # length of a reply whose request names none
    request_seconds: float = 300.0  # from the first byte of a request to the last of its reply
    drain_seconds: float = 60.0  # for running replies after SIGTERM
    body_bytes: int = 32 * MIB
    all_bodies_bytes: int = 256 * MIB  # of all requests that are being taken in
    body_seconds: float = 30.0  # to send a request
    json_depth: int = 64
    json_items: int = 100_000  # values, counted by commas and brackets: each takes memory once parsed
    max_messages: int = 512
    max_images: int = 16  # per request
    max_pixels: int = 50_000_000  # per image
    max_choices: int = 8  # n
    max_stops: int = 16
    stop_length: int = 256  # characters


@dataclass(frozen=True)
class Media:
    """Where images may come from beside `data:` URLs."""

    root: Path | None = None
    domains: tuple[str, ...] = ()  # HOST or HOST:PORT
    fetch_seconds: float = 10.0  # for one image, from looking the name up to the last byte
    fetch_bytes: int = 16 * MIB


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    api_keys: tuple[str, ...] = ()  # none: anyone on this machine
    origins: tuple[str, ...] = ()  # web pages that may call it; none by default
