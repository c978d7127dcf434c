"""`vlm doctor`: what is installed here, and what is missing for what."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import typer

from vlm.errors import ConfigError
from vlm.version import __version__

CORE = (
    "torch", "torchvision", "transformers", "open_clip_torch", "timm", "peft", "safetensors", "pillow", "omegaconf",
    "pydantic",
)  # fmt: skip
EXTRAS = {
    "tensorboard": "track",
    "gradio": "serve",
    "deepspeed": "deepspeed",
    "bitsandbytes": "quant",
    "accelerate": "quant",
    "resvg-py": "demo",
    "gguf": "demo",
}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor() -> None:
    """Print versions, devices, optional packages, cache sizes, free disk. Exit code 2 when a package is missing."""
    print(f"vlm {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in CORE:
        print(f"  {name:16} {_version(name) or 'MISSING'}")
    for name, extra in EXTRAS.items():
        print(f"  {name:16} {_version(name) or f'not installed; optional: pip install -e .[{extra}]'}")
    _print_folders()
    missing = [name for name in CORE if _version(name) is None]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}. Install with: pip install -e .")
    _print_devices()


def _print_folders() -> None:
    for folder in sorted(Path("cache").glob("*/")) if Path("cache").is_dir() else []:
        print(f"{folder}: {_size(folder) / 2**20:,.0f} MiB")
    print(f"free disk here: {shutil.disk_usage('.').free / 2**30:,.0f} GiB")


def _print_devices() -> None:
    from vlm.compat import prepare

    prepare()
    import torch

    print(f"torchvision kernels: {_torchvision_state()}")
    has_flash = importlib.util.find_spec("flash_attn") is not None
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        print(f"GPU {number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.cuda.is_available():
        print(f"FlashAttention: {'yes' if has_flash else 'not installed; sdpa is used instead'}")
    else:
        print(f"no GPU that torch sees; {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    from vlm.precision import describe, resolve

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe("auto", resolve("auto", device), device))


def _torchvision_state() -> str:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        return f"torchvision cannot be imported: {str(error).splitlines()[0]}"
    return "yes" if torchvision.extension._has_ops() else "no (a CUDA build beside a CPU torch); not needed here"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
