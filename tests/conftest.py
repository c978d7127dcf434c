"""For every test: its tier, no network beyond loopback, no hub, no injected fault left over, one thread per process."""

from __future__ import annotations

import gc
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what is measured of this machine, once for all processes
os.environ.setdefault("VLM_CACHE_DIR", str(Path(tempfile.gettempdir()) / "vlm-tests"))
os.environ.pop("VLM_FAULT", None)

import pytest

pytest.register_assert_rewrite("browser_user")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked one_in(n) the first of every n cases stays in its tier; the rest is of the third.

    Files whose tests are slow go first: the small ones then fill the processes up to the end.
    """
    num_cases: Counter[str] = Counter()
    for item in items:
        for mark in item.iter_markers("one_in"):
            test = item.nodeid.partition("[")[0]
            if num_cases[test] % mark.args[0]:
                item.add_marker("slow")
                item.add_marker("thorough")
            num_cases[test] += 1
    num_tests, num_slow = (Counter(item.path for item in chosen) for chosen in (items, filter(_is_slow, items)))
    items.sort(key=lambda item: -num_slow[item.path] / num_tests[item.path])


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


_connect = socket.socket.connect
_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def _connect_loopback_only(self: socket.socket, address: object) -> None:
    if isinstance(address, tuple) and not str(address[0]).startswith(_LOOPBACK):
        raise AssertionError(f"a test tried to reach {address[0]}")
    _connect(self, address)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _connect_loopback_only)


@pytest.fixture(autouse=True)
def no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_FAULT", raising=False)
    from vlm import faults

    faults._fired.clear()
    faults.set_step(0)


gc.set_threshold(30_000, 20, 20)  # a test's models make many objects that live: 2 % of the time
_num_frozen = 0  # modules


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """What large imports brought is not looked at again. Beside torch, transformers and peft a gc.collect() takes 0.4 s
    of a core, and every export calls one."""
    global _num_frozen
    yield
    if len(sys.modules) > _num_frozen + 300:
        _num_frozen = len(sys.modules)
        gc.collect()  # what is garbage by now would stay
        gc.freeze()
