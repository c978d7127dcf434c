"""What torchrun starts as the Python of a rank (PYTHON_EXEC): its work is done by a process forked from a warm server.

It has that one's exit status, passes SIGTERM on to it, and takes it along when it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path

SERVER = "WARM_SERVER"  # the environment variable with its address
KEY = "WARM_SERVER_KEY"


def warm_ranks(folder: Path) -> dict[str, str]:
    """The environment in which torchrun starts such ranks."""
    import warm

    warm.start_server()
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    script.chmod(0o755)
    return {"PYTHON_EXEC": str(script), SERVER: str(forkserver._forkserver._forkserver_address), KEY: _key().hex()}


def _key() -> bytes:
    """What the server asks of who connects, from Python 3.14 on."""
    return getattr(forkserver._forkserver, "_forkserver_authkey", None) or b""


def main() -> None:
    server = forkserver._forkserver
    server._forkserver_authkey = bytes.fromhex(os.environ.pop(KEY))
    server.ensure_running = lambda: None  # it runs, as another process's child
    server._forkserver_address = os.environ.pop(SERVER)
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    resource_tracker.getfd = lambda: os.open(os.devnull, os.O_WRONLY)  # nothing is shared
    arguments = sys.argv[sys.argv.index("vlm.cli.main") + 1 :]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank = multiprocessing.get_context("forkserver").Process(target=work, args=({**os.environ}, os.getcwd(), arguments))
    rank.start()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(rank.pid, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    rank.join()
    if rank.exitcode < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-rank.exitcode, signal.SIG_DFL)
        os.kill(os.getpid(), -rank.exitcode)
    sys.exit(rank.exitcode)


def work(environment: dict[str, str], folder: str, arguments: list[str]) -> None:
    parent = multiprocessing.parent_process()
    for stream in (1, 2):  # it prints where torchrun's process would
        os.dup2(os.open(f"/proc/{parent.pid}/fd/{stream}", os.O_WRONLY | os.O_APPEND), stream)
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # as in `warm`
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from vlm.cli.main import main

    main(arguments)
    sys.stdout.flush()


def end_with(parent: multiprocessing.process.BaseProcess) -> None:
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
