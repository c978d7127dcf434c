"""`vlm doctor`: what is installed here, and what is missing for what."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import typer

from vlm.cli.options import AsJson
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


def doctor(as_json: AsJson = False) -> None:
    """Print versions, devices, optional packages, cache sizes, free disk. Exit code 2 when a package is missing."""
    found = {
        "vlm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in CORE},
        "optional": {name: {"version": _version(name), "extra": extra} for name, extra in EXTRAS.items()},
        "cache": {str(folder): _size(folder) for folder in _cache_folders()},
        "free_disk": shutil.disk_usage(".").free,
    }
    missing = [name for name in CORE if _version(name) is None]
    devices = None if missing else _devices()
    if as_json:
        print(json.dumps({**found, "devices": devices}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(found, devices)))
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}. Install with: pip install -e .")


def _lines(found: dict[str, Any], devices: dict[str, Any] | None) -> list[str]:
    lines = [f"vlm {found['vlm']}, Python {found['python']}, {found['platform']}"]
    lines += [f"  {name:16} {version or 'MISSING'}" for name, version in found["packages"].items()]
    for name, package in found["optional"].items():
        how = f"not installed; optional: pip install -e .[{package['extra']}]"
        lines.append(f"  {name:16} {package['version'] or how}")
    lines += [f"{folder}: {size / 2**20:,.0f} MiB" for folder, size in found["cache"].items()]
    lines.append(f"free disk here: {found['free_disk'] / 2**30:,.0f} GiB")
    if devices is None:
        return lines
    lines.append(f"torchvision kernels: {devices['torchvision_kernels']}")
    for number, gpu in enumerate(devices["gpus"]):
        lines.append(f"GPU {number}: {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB")
    if devices["gpus"]:
        has_flash = devices["flash_attention"]
        lines.append(f"FlashAttention: {'yes' if has_flash else 'not installed; sdpa is used instead'}")
    else:
        lines.append(f"no GPU that torch sees; {devices['cores']} cores, {devices['threads']} threads")
    return [*lines, devices["precision"]]


def _cache_folders() -> list[Path]:
    return sorted(Path("cache").glob("*/")) if Path("cache").is_dir() else []


def _devices() -> dict[str, Any]:
    from vlm.compat import prepare

    prepare()
    import torch

    from vlm.precision import describe, resolve

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torchvision_kernels": _torchvision_state(),
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
        "flash_attention": importlib.util.find_spec("flash_attn") is not None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": describe("auto", resolve("auto", device), device),
    }


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
