"""Make the parts of the tiny project: random models and drawn pictures, in seconds, without a download.

    python scripts/prepare_tiny.py

What is there and intact is kept.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from demo import tiny
from demo.prepared import is_prepared, prepare, recipe_of


def write_parts(folder: Path) -> None:
    from vlm import compat

    compat.prepare()
    texts = tiny.write_data(folder / "data")
    tiny.write_llm(folder / "llm", texts)
    tiny.write_encoder(folder / "encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cache/tiny"))
    folder = parser.parse_args().folder
    recipe = recipe_of([Path(tiny.__file__)])
    if is_prepared(folder, recipe):
        print(f"{folder}: there already")
        return
    started = time.monotonic()
    prepare(folder, recipe, write_parts)
    print(f"{folder}: made in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
