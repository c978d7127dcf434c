"""EVA's own checkpoints (eva_vit_g.pth, as MiniGPT-4 and BLIP-2 use it): timm's names, in a file of torch.save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import CheckpointError
from vlm.models.pth_files import read_pth
from vlm.models.weight_adapter import WeightAdapter, drop, rename
from vlm.models.weight_files import shapes_of

if TYPE_CHECKING:
    from torch import nn

_PARTS = ("cls_token", "pos_embed", "patch_embed.proj.{leaf}")
_IN_BLOCK = (
    "norm1.{leaf}", "norm2.{leaf}", "attn.qkv.weight", "attn.q_bias", "attn.v_bias", "attn.proj.{leaf}",
    "mlp.fc1.{leaf}", "mlp.fc2.{leaf}",
)  # fmt: skip
EVA_PTH = WeightAdapter(
    "EVA's own checkpoints",
    (
        *(rename(name, name) for name in _PARTS),
        *(rename(f"blocks.{{n}}.{name}", f"blocks.{{n}}.{name}") for name in _IN_BLOCK),
        *(
            drop(f"{name}.{{leaf}}") for name in ("norm", "fc_norm", "head")
        ),  # after the last block: no feature reads them
    ),
)


def load_eva(model: Any, file: str) -> set[str]:
    """Copy a file's weights into timm's network, which is whole and of the image size that they were trained for.

    Returns:
        names of the weights that the file did not bring, for `check_loaded` when blocks were cut off: a file may end
        before the last one.

    Raises:
        CheckpointError: not such a file, or of another shape.
    """
    key = "model.vision.pretrained"
    tensors = EVA_PTH.to_ours(read_pth(Path(file), key))
    tensors.refuse_unread(f"{key} {file}")
    own = shapes_of(model.state_dict())
    wrong = [f"  {n}: {list(s)} -> {list(own.get(n, ()))}" for n, s in tensors.shapes.items() if own.get(n) != s]
    if wrong:
        raise CheckpointError(
            f"{key} {file} is not of this network (file -> {type(model).__name__}):\n"
            + "\n".join(wrong[:20])
            + "\nFor eva_vit_g.pth set model.vision.path to eva_giant_patch14_224"
        )
    model.load_state_dict(dict(tensors), strict=False)
    return own.keys() - tensors.keys()


def check_loaded(model: nn.Module, missing: set[str], file: str) -> None:
    """Raises CheckpointError where a weight that is left in the network was not in the file."""
    if lacking := sorted(missing & model.state_dict().keys()):
        raise CheckpointError(
            f"model.vision.pretrained {file}: lacks {len(lacking)} weights of the blocks that are used, e.g. "
            f"{lacking[0]}. Usually the file has 39 blocks: set model.vision.layer to -2 or less"
        )
