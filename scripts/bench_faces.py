"""The same pictures discussed in the terminal, in the browser and over the API: do the answers agree, and how long does
it take from the command to the first token?

    pip install -e '.[test]'; apt-get install chromium
    python scripts/bench_faces.py EXPORT PICTURE [PICTURE ...]

Each face is started as a user starts it, and asked the question about each picture in a conversation of its own:
greedy, streaming. The first picture is timed from the start of the program; the browser is open by
then, as a user's is.
Ends with 1 if two faces gave different answers.
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VLM = [sys.executable, "-m", "vlm.cli.main"]
WRITES = (  # an answer is being written: neither is the model loaded nor the picture read
    "(reading) => [...document.querySelectorAll('#chat [data-testid=bot]')].some("
    "message => !message.querySelector('progress') && message.innerText && !message.innerText.includes(reading))"
)

Face = Callable[[Path, list[Path], str, int], tuple[float, list[str]]]


@contextmanager
def program(*arguments: str, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen([*VLM, *arguments], stdout=subprocess.PIPE, text=True, **settings)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(60)


def address(server: subprocess.Popen[str]) -> str:
    """What it says where it can be reached."""
    assert server.stdout is not None
    for line in server.stdout:
        if "http://" in line:
            return "http://" + line.split("http://", 1)[1].split()[0]
    raise SystemExit("error: the server ended before it served")


def in_terminal(export: Path, pictures: list[Path], question: str, length: int) -> tuple[float, list[str]]:
    seconds, answers = 0.0, []
    quiet = {"stderr": subprocess.DEVNULL, "env": os.environ | {"PYTHONUNBUFFERED": "1"}}
    for picture in pictures:
        started = time.perf_counter()
        flags = ("--image", str(picture), "--prompt", question, "--max-new-tokens", str(length))
        with program("chat", str(export), *flags, **quiet) as chat:
            assert chat.stdout is not None
            first = chat.stdout.read(1)
            seconds = seconds or time.perf_counter() - started
            answers.append((first + chat.stdout.read()).strip())
    return seconds, answers


def in_browser(export: Path, pictures: list[Path], question: str, length: int) -> tuple[float, list[str]]:
    from playwright.sync_api import sync_playwright

    from vlm.apps.web.texts import tell

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    seconds, answers = 0.0, []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(locale="en-US").new_page()
        page.set_default_timeout(120_000)
        started = time.perf_counter()
        with program("webui", str(export), "--port", "0", "--max-new-tokens", str(length)) as server:
            page.goto(address(server))
            page.wait_for_function("document.documentElement.dataset.started === 'yes'")
            for number, picture in enumerate(pictures):
                if number:
                    page.click("#clear")
                    page.wait_for_function("document.querySelectorAll('#chat .stats').length === 0")
                page.set_input_files("#box input[type=file]", [str(picture)])
                page.wait_for_selector("#box img")
                page.fill("#box textarea", question)
                page.press("#box textarea", "Enter")
                page.wait_for_function(WRITES, arg=tell("en", "reading"))
                seconds = seconds or time.perf_counter() - started
                page.wait_for_selector("#chat .stats")
                said = page.locator("#chat [data-testid=bot]:not(:has(.stats))").last
                answers.append(said.inner_text().strip())
        browser.close()
    return seconds, answers


def over_api(export: Path, pictures: list[Path], question: str, length: int) -> tuple[float, list[str]]:
    from openai import OpenAI

    seconds, answers = 0.0, []
    started = time.perf_counter()
    with program("serve", str(export), "--port", "0") as server:
        client = OpenAI(base_url=address(server), api_key="none")
        name = client.models.list().data[0].id
        for picture in pictures:
            url = f"data:image/{picture.suffix[1:]};base64,{base64.b64encode(picture.read_bytes()).decode()}"
            content: list[Any] = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question},
            ]
            said = ""
            for chunk in client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=length,
                stream=True,
            ):
                piece = chunk.choices[0].delta.content or ""
                if piece and not seconds:
                    seconds = time.perf_counter() - started
                said += piece
            answers.append(said.strip())
    return seconds, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--question", default="What is this?")
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    faces: dict[str, Face] = {"terminal": in_terminal, "browser": in_browser, "API": over_api}
    found = {}
    for name, ask in faces.items():
        seconds, found[name] = ask(arguments.export, arguments.pictures, arguments.question, arguments.new_tokens)
        print(f"{name}: start to first token {seconds:.1f} s", flush=True)
    for number, picture in enumerate(arguments.pictures):
        answers = {name: said[number] for name, said in found.items()}
        same = len(set(answers.values())) == 1
        print(f"{picture.name}: {answers['terminal']!r}" if same else f"{picture.name}: DIFFERENT {answers}")
    if len({tuple(said) for said in found.values()}) > 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
