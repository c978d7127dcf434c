"""The processes of one launch: who am I, sums, and decisions that all of them take together.

Without a launcher's variables (`vlm.launch`) this is a world of one process, and nothing here communicates.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlm.errors import DistributedError, VLMError
from vlm.launch import is_on_one_machine, launched_size

T = TypeVar("T")
_timeout: timedelta | None = None  # of collectives
_store: Any = None  # the key-value store of the launch; says where each rank was when one of them is lost
_ended: list[Any] = []  # groups that were left, kept until the process ends: see `process_group`
_beside: Any = None  # a group of all processes, for threads that work beside training
_thread = threading.local()
has_met_others = False  # whether this process was ever one of several
_turns = 0  # how often the others waited for rank 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def new_group(ranks: Sequence[int]) -> Any:
    """A group of some of the processes, made by all of them. Its collectives wait no longer than those of all."""
    return dist.new_group(list(ranks), timeout=_timeout)


@contextmanager
def process_group(device: torch.device, timeout_seconds: float, *, always: bool = False) -> Iterator[None]:
    """Join the processes of the launch, and leave them at the end.

    Args:
        device: cpu takes gloo, cuda takes nccl for tensors on the GPU and gloo for those on the host.
        timeout_seconds: a collective that waits longer fails on every rank.
        always: make a group even in a world of one, as DeepSpeed and fully_shard demand.
    """
    global _store, _timeout, _beside, has_met_others
    size = launched_size()
    if dist.is_initialized() or (size == 1 and not always):
        yield
        return
    if is_on_one_machine():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # stay on its loopback
    # torch's own FSDP and DeepSpeed call functions that torch renamed: nothing that a user could act on
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # of DeepSpeed's pipeline, which brings gradients back by itself
    warnings.filterwarnings("ignore", message=r"c10d::broadcast_: an autograd kernel was not registered")
    _timeout = timeout = timedelta(seconds=timeout_seconds)
    if size == 1:
        _store, own = dist.HashStore(), 0
    else:
        _store, own, size = next(dist.rendezvous("env://", timeout=timeout))
    has_met_others = size > 1
    _store.set_timeout(timeout)
    _store = dist.PrefixStore(_agree_on_prefix(_store, own, size, timeout_seconds), _store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store, rank=own, world_size=size, timeout=timeout)
    _beside = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    try:
        with _name_the_lost():
            yield
    finally:
        _store = _timeout = None
        _ended.append(_beside)
        # DistributedDataParallel would hold the last reference, and freeing it there can hang: the group waits for its
        # threads with Python's lock held, and a thread that frees a tensor waits for that lock
        _ended.append(dist.group.WORLD)
        dist.destroy_process_group()


def _agree_on_prefix(store: Any, own: int, size: int, timeout_seconds: float) -> str:
    """A name that the processes alive now share, and no earlier ones did.

    torchrun keeps its store over restarts, so what the processes before wrote there (where to connect to) still
    stands, and their number of restarts differs between machines. Rank 0 makes the name and answers each rank's own
    question with it, until that rank has confirmed.
    """
    mine = uuid.uuid4().hex
    if own > 0:
        store.set(f"question/{own}", mine)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/joined/{own}", "")
        return name
    waiting, end = set(range(1, size)), time.monotonic() + timeout_seconds
    while waiting:
        if time.monotonic() > end:
            raise DistributedError(f"rank {min(waiting)} did not join within {timeout_seconds:g} s; was it started?")
        for other in sorted(waiting):
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", mine)
            if store.check([f"{mine}/joined/{other}"]):
                waiting.remove(other)
        time.sleep(0.01)
    return mine


def note(phase: str) -> None:
    """Say what this rank is doing, for the error that the others raise if it never comes back from it."""
    if _store is not None and world_size() > 1:
        _store.set(f"phase/{rank()}", phase)


def sum_over_ranks(values: list[float], group: Any = None) -> list[float]:
    """Element-wise sums over all ranks (of a group), in float64."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=group)
    return tensor.tolist()


@contextmanager
def beside_training() -> Iterator[None]:
    """In another thread than training's: what the processes tell each other in the block goes over a group of its own.

    All processes make the same calls in the same order there too, whatever step each of them is at.
    """
    _thread.is_beside = True
    try:
        yield
    finally:
        _thread.is_beside = False


def _is_beside() -> bool:
    return getattr(_thread, "is_beside", False)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: T) -> list[T]:
    """What every rank gave, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_beside if _is_beside() else None)
    return gathered


def on_main(compute: Callable[[], T]) -> T:
    """The result of `compute` on rank 0, on every rank. An error there is raised everywhere."""

    def own() -> T | None:
        with _turn_of_main():
            return compute() if is_main() else None

    return gather_objects(together(own))[0]  # type: ignore[return-value]


def in_own_time(compute: Callable[[], T]) -> T:
    """Run `compute` on every rank, which may take each as long as it likes; errors as of `together`."""

    def own() -> T:
        with _after_all():
            return compute()

    return together(own)


def together(compute: Callable[[], T]) -> T:
    """Run `compute` on every rank and return this rank's result. If it fails on one, all raise the first failure.

    Only errors of ours and of the operating system are shared; others are bugs and end their own rank.
    """
    if world_size() == 1:
        return compute()
    failure: tuple[type, str] | None = None
    result: Any = None
    try:
        result = compute()
    except (VLMError, OSError) as error:
        failure = (type(error) if isinstance(error, VLMError) else OSError, str(error))
    for failed in gather_objects(failure):
        if failed is not None:
            raise _rebuild(*failed)
    return result


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block alone, the others after it: what it puts into a shared cache, they find there."""
    if world_size() == 1:
        yield
        return
    failure: tuple[type, str] | None = None
    with _turn_of_main():
        if is_main():
            try:
                yield
            except VLMError as error:
                failure = (type(error), str(error))
    outcome = gather_objects(failure)[0]
    if outcome is not None:
        raise _rebuild(*outcome)
    if not is_main():
        yield


@contextmanager
def _turn_of_main() -> Iterator[None]:
    """Rank 0 goes through the block, however long it takes; the others wait for that before they enter it.

    They wait outside of a collective, whose timeout is for ranks that hang: encoding all images of a run, or adding
    up the hashes of a large checkpoint, takes longer. If rank 0 is lost, the launcher ends them. Beside training they
    wait in a collective: a thread that never noticed would keep its process from ending.
    """
    global _turns
    if world_size() == 1 or _store is None or _is_beside():
        yield
        return
    _turns += 1
    key = f"turn/{_turns}"
    if is_main():
        try:
            yield
        finally:
            _store.set(key, "")
        return
    pause = 0.001
    while not _store.check([key]):
        time.sleep(pause)
        pause = min(0.5, 2 * pause)
    yield


@contextmanager
def _after_all() -> Iterator[None]:
    """Every rank leaves the block when all have come to its end, outside of a collective as above."""
    global _turns
    if world_size() == 1 or _store is None:
        yield
        return
    _turns += 1
    keys = [f"turn/{_turns}/{number}" for number in range(world_size())]
    try:
        yield
    finally:
        _store.set(keys[rank()], "")
        pause = 0.001
        while not _store.check(keys):
            time.sleep(pause)
            pause = min(0.5, 2 * pause)


def _rebuild(kind: type[Exception], message: str) -> Exception:
    error = kind.__new__(kind, message)  # some take other arguments than their message
    if isinstance(error, VLMError):
        error.everywhere = True
    return error


@contextmanager
def _name_the_lost() -> Iterator[None]:
    """A collective that fails says only that something did; say where every rank was."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors, and gloo's
        if not _is_collective_failure(error):
            raise
        raise DistributedError(
            f"rank {rank()} waited for another rank, which did not come ({str(error).splitlines()[0][:200]}). "
            "Last seen:\n"
            + "\n".join(f"  rank {number}: {_phase(number)}" for number in range(world_size()))
            + "\nUsually a process was killed (memory?) or hangs: look at the output of the rank that is furthest "
            "behind. The same command resumes from the newest checkpoint; torchrun --max-restarts=3 does so by itself; "
            "engine.timeout_seconds sets how long ranks wait"
        ) from None


def _is_collective_failure(error: RuntimeError) -> bool:
    words = (
        "Timed out",
        "timed out",
        "Connection closed",
        "Connection reset",
        "gloo",
        "NCCL",
        "Broken pipe",
        "timeout",
    )
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _phase(number: int) -> str:
    with suppress(RuntimeError):
        key = f"phase/{number}"
        if _store is not None and _store.check([key]):
            return _store.get(key).decode()
    return "nothing noted"
