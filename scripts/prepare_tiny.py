"""Make the parts of the tiny project: random models and drawn pictures, in seconds, without a download.

python scripts/prepare_tiny.py
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from demo.tiny import write_data, write_encoder, write_llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cache/tiny"))
    folder = parser.parse_args().folder
    if folder.exists():
        print(f"{folder}: there already")
        return
    from vlm.compat import prepare

    prepare()
    started = time.monotonic()
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    texts = write_data(temporary / "data")
    write_llm(temporary / "llm", texts)
    write_encoder(temporary / "encoder")
    temporary.rename(folder)
    print(f"{folder}: made in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
