"""Serve the studio: on 127.0.0.1 only, to the browser that has the key."""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from vlm.apps.studio.key import KeyGuard
from vlm.apps.studio.settings import Studio
from vlm.apps.web.app import RunningPage, WebOptions, run_until_ended, serve_page
from vlm.apps.web.uploads import Uploads

if TYPE_CHECKING:
    import gradio as gr


def serve(studio: Studio, port: int = 7861) -> RunningPage:
    """Start serving; returns once the page answers. Its address holds the key that opens it.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: the port is in use or may not be taken.
        MissingPackageError: gradio is not installed.
    """
    from vlm.apps.studio.look import HEAD

    key = secrets.token_urlsafe(24)

    def build(uploads: Uploads) -> gr.Blocks:
        from vlm.apps.studio.page import build_page

        return build_page(studio, uploads)

    running = serve_page(build, WebOptions(port=port), HEAD, inner=partial(KeyGuard, key=key))
    return replace(running, url=f"{running.url}?key={key}")


def run_studio(studio: Studio, port: int) -> None:
    """What `vlm studio` does: serve until Ctrl-C or SIGTERM. Runs go on. Raises as `serve`."""
    greeting = f"Runs: {studio.runs}\nOpen {{url}}\nCtrl-C ends the page; runs go on."
    run_until_ended(lambda: serve(studio, port), greeting)
