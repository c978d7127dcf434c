"""The clients that people use, against a server on loopback, in environments made once in pytest's cache."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import NAME, Running, user
from environments import make_environment

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent / "clients"
PYTHON = ["openai", "langchain-openai", "litellm", "llama-index-llms-openai-like>=0.5"]
NPM = ["openai@6", "ai@6", "@ai-sdk/openai-compatible@2", "@ai-sdk/openai@3", "zod@4"]
ENVIRONMENT = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1"}
# what each client should get: the reply about the image, the beginning of a text gone on with, or itself
ITSELF: dict[str, Any] = {
    "openai models": [NAME], "openai message put back": True, "langchain json mode": "str", "langchain system": True,
    **dict.fromkeys(
        ("openai parse", "openai stream helper", "openai responses parse", "openai responses stream helper",
         "langchain structured", "ai sdk object", "ai sdk responses object"),
        frozenset({"red", "green"}),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    folder = request.config.cache.mkdir("api-clients-python")
    interpreter, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        make_environment(folder, PYTHON)
        done.touch()
    return interpreter


@pytest.fixture(scope="module")
def npm(request: pytest.FixtureRequest) -> Path:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = request.config.cache.mkdir("api-clients-npm")
    done = folder / "done"
    if not done.exists():
        (folder / "package.json").write_text('{"private": true}')
        command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *NPM]
        tried = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"the registry has not given the clients: {tried.stderr.strip()[-300:]}")
        done.touch()
    return folder


@pytest.fixture
def expected(server: Running, export: Path) -> Callable[[str], Any]:
    """What a client of that name should get."""
    url = "data:image/png;base64," + base64.b64encode((export.parents[1] / "1.png").read_bytes()).decode()
    client = server.openai()
    settings: Any = {"model": NAME, "temperature": 0, "max_tokens": 12}

    def reply(*urls: str) -> Any:
        messages: Any = user("What is this?", *urls)
        return client.chat.completions.create(messages=messages, **settings).choices[0].message.content

    about, plain = reply(url), reply()
    text = client.completions.create(prompt="What is", **settings).choices[0].text
    assert len({about, plain, text}) == 3

    def find(name: str) -> Any:
        if name == "npm openai responses":
            return plain
        return ITSELF.get(name, text if name.endswith(("completions", "complete")) else about)

    return find


def told(output: str) -> Iterator[tuple[str, Any]]:
    """Name and answer of each client."""
    for line in output.splitlines():
        if line.startswith('{"name"'):
            values = json.loads(line)
            yield values["name"], values.get("got", values.get("error"))


def compare(output: subprocess.CompletedProcess[str], expected: Callable[[str], Any], count: int) -> None:
    answers = dict(told(output.stdout))
    assert len(answers) == count, output.stderr[-2000:]
    wrong = {}
    for name, got in answers.items():
        wanted = expected(name)
        if got not in (wanted if isinstance(wanted, frozenset) else [wanted]):
            wrong[name] = got
    assert wrong == {}


def ask(command: list[Any], server: Running, export: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    image = export.parents[1] / "1.png"
    return subprocess.run(
        [*command, f"{server.url}/v1", NAME, image],
        capture_output=True, text=True, timeout=900, check=False, env=os.environ | ENVIRONMENT, **settings,
    )  # fmt: skip


def test_openai_langchain_litellm_and_llama_index(
    server: Running, export: Path, python: Path, expected: Callable[[str], Any]
):
    compare(ask([python, HERE / "ask.py"], server, export), expected, 28)


def test_npms_openai_and_ai_sdk(server: Running, export: Path, npm: Path, expected: Callable[[str], Any]):
    compare(ask(["node", HERE / "ask.mjs"], server, export, cwd=npm), expected, 10)
