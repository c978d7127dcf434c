"""Lines from the user: with editing, history and completion at a terminal, plain elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vlm.data.records import IMAGE_SUFFIXES
from vlm.logs import warn

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History

# (prompt, is it an image that is asked for) -> line; EOFError at the end of input, KeyboardInterrupt at Ctrl-C
ReadLine = Callable[[str, bool], str]


def line_reader(out: TextIO, completer: Callable[[], Completer]) -> ReadLine:
    """
    Args:
        completer: makes the completer of the chat's own lines; called at a terminal only.
    """
    if not (sys.stdin.isatty() and out.isatty()):
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # bytes that are no text must not end the program
        return _plain_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    chat: PromptSession[str] = PromptSession(
        history=open_history(history_file()), completer=completer(), complete_while_typing=False
    )
    images: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=image_completer(), complete_while_typing=False
    )
    return lambda prompt, asks_for_image: (images if asks_for_image else chat).prompt(prompt)


def image_completer() -> Completer:
    """Completes folders and images."""
    from prompt_toolkit.completion import PathCompleter

    return PathCompleter(expanduser=True, file_filter=_is_folder_or_image)


def history_file() -> Path:
    """Below XDG_STATE_HOME, by default ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"  # relative ones do not count
    return root / "vlm" / "chat_history"


def open_history(path: Path) -> History:
    """What was typed before, for the arrow keys. Only its owner can read the file (mode 600).

    A file that cannot be written is said once, and the history is then of this chat only.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:  # the disk has filled up since
                warn(f"chat history {path} cannot be written ({error.strerror}); this line is not kept")

        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        warn(f"chat history {path} cannot be written ({error.strerror}); what you type is not kept")
        return InMemoryHistory()
    return Kept(str(path))


def _is_folder_or_image(name: str) -> bool:
    return os.path.isdir(name) or name.lower().endswith(IMAGE_SUFFIXES)


def _plain_line(prompt: str, asks_for_image: bool) -> str:
    if sys.stdin.isatty():  # only what is written goes into a file: the user still sees what is asked
        sys.stderr.write(prompt)
        sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair becomes ?
