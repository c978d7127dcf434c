"""A cache of frozen-encoder features on disk, found by the content of the image file.

A file that is replaced or edited has other content and so another entry: features never go stale. What produced them
(encoder, weights, image size, normalisation, number type) is the caller's `key`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.compat import follow_umask
from vlm.errors import RecordError
from vlm.files import replacing


@dataclass(frozen=True)
class FeatureStore:
    """Features per image, one safetensors file each, below `folder / key`: [P, C] of one tile, else [tiles, P, C]."""

    folder: Path
    key: str
    dtype: torch.dtype = torch.bfloat16  # that they are kept in, whatever they were computed in

    def get(self, image: str | bytes) -> Tensor | None:
        """The features of an image, [tiles, P, C], or None when they are not there or damaged.

        Raises:
            RecordError: rule image_missing.
        """
        try:
            features = load_file(self._path(image))["features"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return features if features.ndim == 3 else features[None]

    def has(self, image: str | bytes) -> bool:
        """Is there an entry whose file is whole? Reads its header only.

        Raises:
            RecordError: rules image_missing, image_unreadable.
        """
        try:
            with safe_open(self._path(image), framework="pt") as file:
                return "features" in file.keys()  # noqa: SIM118  no mapping
        except (FileNotFoundError, SafetensorError):
            return False

    def put(self, image: str | bytes, features: Tensor) -> None:
        """Keep features [tiles, P, C]. Raises OSError when the disk refuses."""
        path = self._path(image)
        features = features[0] if len(features) == 1 else features
        try:
            with replacing(path) as temporary:
                save_file({"features": features.detach().to("cpu", self.dtype).contiguous()}, temporary)
                follow_umask(temporary)
        except SafetensorError as error:
            raise OSError(f"{path.parent}: features could not be written ({error})") from None

    def _path(self, image: str | bytes) -> Path:
        digest = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else _file_digest(*_identity(image))
        return self.folder / self.key / digest[:2] / f"{digest[2:32]}.safetensors"


def encoder_key(encoder: torch.nn.Module, settings: object) -> str:
    """Changes with any weight of the encoder and with `settings`, whose repr counts."""
    state = hashlib.sha256(repr(settings).encode())
    for name, tensor in encoder.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:24]


def _identity(path: str) -> tuple[str, int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        raise RecordError("image_missing", f"{Path(path).name} does not exist") from None
    return path, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=100_000)
def _file_digest(path: str, size: int, modified_ns: int) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordError("image_unreadable", f"{Path(path).name} cannot be read ({error.strerror})") from None
