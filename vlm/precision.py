"""Number formats: what a name of `train.precision` means, and which one this machine computes fast.

Every number here that rules a choice is measured on the machine, in some tenths of a second, and remembered below
`machine_folder()`. A choice moves results by rounding only; what it is, is one line of the log.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from vlm.errors import ConfigError
from vlm.files import replacing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MATRIX = (128, 512, 512)  # rows, inner, columns: a few ms in bf16 even where it is emulated (88 ms on AVX2)
_CHANNELS, _SIDE = 96, 56  # of the depthwise convolution, 3 x 3, one image
_SECONDS = 0.05  # spent on each call that is timed, or one round if that takes longer
_LONGEST_WAIT = 120.0  # seconds, for another process that measures
_remembered: dict[str, Any] = {}  # of this process; the file is for the next one


@dataclass(frozen=True)
class CpuSpeed:
    """How often bfloat16 does what float32 does once: above 1 it is faster."""

    matrix_product: float
    depthwise_convolution: float

    @property
    def is_bf16_fast(self) -> bool:
        """A language model is matrix products; an encoder that convolves is measured by itself (models/vision)."""
        return self.matrix_product > 1.0

    def __str__(self) -> str:
        return (
            f"matrix product {_times(self.matrix_product)}, depthwise convolution {_times(self.depthwise_convolution)}"
        )


def frozen_dtype(precision: str) -> torch.dtype:
    """Of weights that do not train under a `train.precision` other than auto; those that train are float32."""
    return {**DTYPES, "bf16_autocast": torch.float32}[precision]


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What linear layers compute in under a `train.precision` other than auto; None: in the weights' own dtype."""
    return {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16, "bf16_autocast": torch.bfloat16}[precision]


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch's autocast to `dtype`; None and float32 switch it off, also inside another one."""
    if dtype in (None, torch.float32):
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=dtype)


def fast_precision(device: torch.device) -> str:
    """ "bf16" where the device computes it natively and faster, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if cpu_speed().is_bf16_fast else "fp32"


def resolve(precision: str, device: torch.device, key: str = "precision") -> str:
    """`precision`, auto replaced by what is fast on the device.

    Args:
        key: how the user set it, for the message.

    Raises:
        ConfigError: float16 on a CPU, which takes about a hundred times as long.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            f"{key} fp16 needs a GPU, and this is the CPU, where float16 is a hundred times slower: set {key} to auto, "
            "bf16 or fp32"
        )
    return fast_precision(device) if precision == "auto" else precision


def describe(wanted: str, precision: str, device: torch.device) -> str:
    """The line of the log: which precision, and why."""
    if wanted != "auto":
        return f"precision: {precision}, as the config says"
    if device.type == "cuda":
        return f"precision: {precision}, as the GPU has {'' if precision == 'bf16' else 'no '}bfloat16 units"
    return f"precision: {precision}, as on this CPU bfloat16 is, against float32: {cpu_speed()}"


def complaint(precision: str, device: torch.device) -> str:
    """What is wrong with a precision that the config asks for: how much slower it is here. "" if nothing is."""
    if device.type != "cpu" or autocast_dtype(precision) is None or cpu_speed().is_bf16_fast:
        return ""
    return (
        f"train.precision {precision}: this CPU computes it in software, {1 / cpu_speed().matrix_product:.0f} times "
        "slower than fp32 in matrix products. Set it to auto or fp32 (auto takes fp32 here)"
    )


def cpu_speed() -> CpuSpeed:
    """Measured once per machine, version of torch and instruction set."""
    return CpuSpeed(**remember("cpu", lambda: asdict(_measure_cpu())))


def remember(
    what: str, measure: Callable[[], Any], again: bool = False, keep: Callable[[Any], bool] = lambda found: True
) -> Any:
    """The result of `measure`, a JSON value, from this process, from the file of this machine, or measured now.

    Processes that start together wait for the first one's result, so that all of them choose alike. A folder that
    cannot be written costs a measurement in each process, nothing else.

    Args:
        again: measure now, and remember that.
        keep: whether the next process may have what was measured.
    """
    key = f"{what} on {_machine_key()}"
    if again or key not in _remembered:
        path = machine_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        found = None if again else _read(path, key)
        if found is None:
            with _one_at_a_time(path.with_suffix(".lock")):
                found = None if again else _read(path, key)  # another process may have measured meanwhile
                if found is None:
                    found = measure()
                    if keep(found):
                        _write(path, {"key": key, "value": found})
        _remembered[key] = found
    return _remembered[key]


def machine_folder() -> Path:
    """Where facts about this machine are kept: $VLM_CACHE_DIR/machine, else vlm/machine in the user's cache folder."""
    own = os.environ.get("VLM_CACHE_DIR")
    return (Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm") / "machine"


def compare(calls: Sequence[Callable[[], Any]], budget: float = _SECONDS) -> list[float]:
    """Seconds of each call: the fastest of several rounds, in turn and on one thread.

    Threads that wait for a core that other programs use can make the faster call look slower by any factor; one thread
    and the fastest round do not depend on what else runs.

    Args:
        budget: seconds per call after a first one, which warms up; one round counts at least.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for call in calls:
            call()
        best, started = [float("inf")] * len(calls), time.perf_counter()
        while best[0] == float("inf") or time.perf_counter() - started < budget * len(calls):
            best = [min(seconds, _seconds(call)) for seconds, call in zip(best, calls, strict=True)]
        return best
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _measure_cpu() -> CpuSpeed:
    rows, inner, columns = _MATRIX
    return CpuSpeed(
        matrix_product=_ratio(torch.ones(rows, inner), torch.ones(columns, inner), torch.nn.functional.linear),
        depthwise_convolution=_ratio(
            torch.ones(1, _CHANNELS, _SIDE, _SIDE),
            torch.ones(_CHANNELS, 1, 3, 3),
            lambda image, weight: torch.nn.functional.conv2d(image, weight, padding=1, groups=_CHANNELS),
        ),
    )


@torch.no_grad()
def _ratio(left: Tensor, right: Tensor, call: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Time of float32 over time of bfloat16, of a call with two tensors [...]."""
    halves = left.bfloat16(), right.bfloat16()
    single, half = compare([lambda: call(left, right), lambda: call(*halves)])
    return single / half


def _machine_key() -> str:
    """Changes with what changes the speed of a kernel."""
    facts = (
        _cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.__version__,
        os.environ.get("ONEDNN_MAX_CPU_ISA", ""), torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    )  # fmt: skip
    return ", ".join(map(str, facts))


def _cpu_name() -> str:
    """Model and instructions: virtual machines of one name differ in what they let through."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    facts = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = hashlib.sha256(facts.get("flags", facts.get("Features", "")).encode()).hexdigest()[:8]
    return f"{facts.get('model name', platform.machine())} {flags}"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    lock = FileLock(path, timeout=_LONGEST_WAIT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, Timeout):  # a folder that cannot be written, or a process that hangs
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _read(path: Path, key: str) -> Any:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["value"] if stored["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: measured again
        return None


def _write(path: Path, value: Any) -> None:
    with suppress(OSError), replacing(path) as temporary:  # read-only home: measured again next time
        temporary.write_text(json.dumps(value), encoding="utf-8")


def _times(ratio: float) -> str:
    """
    >>> _times(4.3), _times(0.0125)
    ('4.3x faster', '80x slower')
    """
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.0f}x slower"
