"""What differs between versions and builds of the libraries: torchvision beside a CPU torch, renamed arguments, modes.

The package index ships torchvision with CUDA kernels only. Beside a CPU torch its extension cannot load, and
`import torchvision` fails with "operator torchvision::nms does not exist", which takes transformers' model classes,
timm, open_clip and peft down with it. Nothing here uses these operators: naming their schemas is enough for
torchvision's Python code to import. Those that somebody else has named stay as they are: a second definition of an
operator is an error.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from vlm.logs import Progress, is_logging_rank

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []  # a torch.library.Library undoes its definitions when it is collected
_is_prepared = False


def prepare() -> None:
    """Call before the first import of timm, open_clip, peft, torchvision or transformers' models. Cheap to repeat."""
    global _is_prepared
    if _is_prepared:
        return
    _is_prepared = True
    # on a CPU it warns of kernels for 4-bit weights whenever transformers or peft find it installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if os.name == "nt" or "torchvision" in sys.modules:  # Windows wheels have kernels that fit; imported, it works
        return
    spec = importlib.util.find_spec("torchvision")  # may run the finder of a stub, which defines them itself
    if spec is None or spec.origin is None:
        return
    # Only where the kernels cannot load: a second definition of an operator that they bring would end the process.
    if not _loads(Path(spec.origin).parent):
        _define_missing()


def quiet_progress() -> None:
    """transformers' bars while weights load: on a terminal, by one rank; a log file gets a line now and then."""
    if not (sys.stderr.isatty() and is_logging_rank()):
        from transformers.utils import logging

        logging.disable_progress_bar()
        if hasattr(logging, "set_tqdm_hook"):  # not in the oldest versions of the range
            logging.set_tqdm_hook(_bar_or_lines)


def _bar_or_lines(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What transformers asks for as a bar. The one over the tensors of a model tells its progress in lines."""
    if kwargs.get("desc") == "Loading weights" and args and hasattr(args[0], "__len__"):
        return factory(_told(args[0]), **kwargs)
    return factory(*args, **kwargs)


def _told(items: Collection[Any]) -> Iterator[Any]:
    with Progress("model: loaded", len(items), "tensors") as progress:
        for number, item in enumerate(items):
            progress.show(number)
            yield item


def cache_argument(function: Callable[..., Any]) -> str:
    """What a forward, or a maker of masks, of the installed transformers calls its cache of keys and values.

    `past_key_values` became `cache` in transformers 5.24; the old name warns there and is gone in 5.40, where a forward
    with `**kwargs` would take it in silence and start every token without the ones before.
    """
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def _define_missing() -> None:
    """Name the operators that neither torchvision nor a stub of it (a sitecustomize, a plugin) has named yet."""
    import torch

    missing = [schema for schema in _SCHEMAS if not hasattr(torch.ops.torchvision, schema.partition("(")[0])]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _libraries.append(library)


def follow_umask(file: Path) -> None:
    """Give a file the mode of any new file. safetensors 0.8 writes files that only their owner may read.

    Seen at a file beside it: the umask is read by changing it, for all threads, and some write beside this one.
    """
    fresh = file.with_name(f"{file.name}.mode")
    fresh.touch()
    try:
        file.chmod(fresh.stat().st_mode & 0o777)
    finally:
        fresh.unlink()


def _loads(package: Path) -> bool:
    """Whether torchvision's extension loads; the same attempt that torchvision makes while it is imported."""
    import torch

    try:
        for extension in package.glob("_C*.so"):
            torch.ops.load_library(str(extension))
            return True
    except OSError:
        return False
    return False
