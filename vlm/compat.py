"""Makes a CUDA build of torchvision importable beside a CPU build of torch.

The package index ships torchvision with CUDA kernels only. Beside a CPU torch its extension cannot load, and
`import torchvision` fails with "operator torchvision::nms does not exist", which takes transformers' model classes,
timm, open_clip and peft down with it. Nothing here uses these operators: naming their schemas is enough for
torchvision's Python code to import.
"""

from __future__ import annotations

import importlib.util

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []  # a torch.library.Library undoes its definitions when it is collected


def prepare() -> None:
    """Call before the first import of timm, open_clip, peft, torchvision or transformers' models. Cheap to repeat."""
    if _libraries or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    if torch.version.cuda is not None:
        return  # a CUDA torch loads the extension itself
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _libraries.append(library)
