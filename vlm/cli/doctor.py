"""`vlm doctor`: what is installed here, and what is missing for what."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import typer

from vlm import __version__

CORE = ("torch", "torchvision", "transformers", "open_clip_torch", "timm", "peft", "safetensors", "pillow", "omegaconf")
EXTRAS = {
    "tensorboard": "track",
    "gradio": "serve",
    "deepspeed": "deepspeed",
    "bitsandbytes": "quant",
    "resvg-py": "demo",
}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor() -> None:
    """Print versions, devices, optional packages, cache sizes and free disk."""
    print(f"vlm {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in CORE:
        print(f"  {name:16} {_version(name) or 'MISSING: pip install -e .'}")
    for name, extra in EXTRAS.items():
        print(f"  {name:16} {_version(name) or f'not installed: pip install -e .[{extra}]'}")
    from vlm.compat import prepare

    prepare()
    import torch
    import torchvision

    has_kernels = torchvision.extension._has_ops()
    print(f"torchvision kernels: {'yes' if has_kernels else 'no (a CUDA build beside a CPU torch; not needed here)'}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            print(f"GPU {number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        print(f"no GPU; {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    for folder in sorted(Path("cache").glob("*/")) if Path("cache").is_dir() else []:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 2**20:,.0f} MiB")
    print(f"free disk: {shutil.disk_usage('.').free / 2**30:,.0f} GiB")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
