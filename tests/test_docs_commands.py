"""Every command in a ```bash block of the documents parses, and every link leads somewhere."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from vlm.cli.main import app
from vlm.cli.process import repeat_options, with_hyphens
from vlm.cli.root_scripts import train_parser, train_pipeline_parser
from vlm.cli.train import deepspeed_options
from vlm.config import json_schema, shipped_projects

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
DOCUMENTS = [*READMES, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("projects/*/README.md"))]
SCRIPTS = {"train.py": train_parser, "train_pipeline.py": train_pipeline_parser}
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def commands(document: str) -> Iterator[list[str]]:
    """The words of each command in a ```bash block: variables are 2, brackets around optional words are dropped."""
    for block in re.findall(r"^```bash\n(.*?)^```", document, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\$[A-Z_]+", "2", block.replace("\\\n", " ")).splitlines():
            words = [word[1:] if word.startswith("[-") else word for word in shlex.split(line, comments=True)]
            words = [word[:-1] if word.count("]") > word.count("[") else word for word in words]
            end = next((number for number, word in enumerate(words) if word in ("|", ">")), None)
            if words:
                yield words[:end]


def check(words: list[str]) -> list[str]:
    """Raises or exits if the command is wrong. Returns the config overrides in it."""
    script = next((name for name in SCRIPTS if name in words), None)
    if script is not None:
        before, after = words[: words.index(script)], words[words.index(script) + 1 :]
        if before[:1] == ["torchrun"] or before[:3] == ["python", "-m", "torch.distributed.run"]:
            from torch.distributed.run import get_args_parser

            launcher = before[1:] if before[0] == "torchrun" else before[3:]
            assert get_args_parser().parse_args([*launcher, script]).training_script == script
        parsed = SCRIPTS[script]().parse_args(with_hyphens(after))
        return [*parsed.options, *deepspeed_options(getattr(parsed, "deepspeed", None))]
    if "vlm" in words:
        return check_vlm(words[words.index("vlm") + 1 :])
    if words[0] == "python" and words[1].startswith("scripts/"):
        text = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), words
        return words[words.index("--options") + 1 :] if "--options" in words else []
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
    return []


@functools.cache
def the_command() -> Any:
    return typer.main.get_command(app)


@functools.cache
def the_schema() -> dict[str, Any]:
    return json_schema()


def check_vlm(words: list[str]) -> list[str]:
    command = the_command()
    arguments = repeat_options(with_hyphens(words))
    while hasattr(command, "commands"):
        verb, *arguments = arguments
        command = command.commands[verb]
    values = command.make_context(command.name, arguments).params  # raises for what it does not know
    overrides = [text for text in values.get("options") or () if text != "..."]
    return [*overrides, *deepspeed_options(values.get("deepspeed"))]


def is_key(key: str) -> bool:
    """Whether `a.b.c` is a key of the config."""
    schema = the_schema()
    section: dict[str, Any] = schema
    for part in re.sub(r"\[.*?\]", "", key).split("."):  # of a list any entry, of a dict any key
        section = section.get("properties", {}).get(part)
        if section is None:
            return False
        choices = [section, *section.get("anyOf", ())]
        choices += [choice.get("items", {}) for choice in choices]
        choices = [schema["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each for each in choices]
        section = next((each for each in choices if "properties" in each), section)
    return True


def anchors(document: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_that_is_printed_parses(document: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "vlm.train.engines.deepspeed_settings.read_json", lambda path: {"zero_optimization": {"stage": 2}}
    )
    for words in commands(document.read_text(encoding="utf-8")):
        for override in check(words):
            assert is_key(override.partition("=")[0]), f"{override} in {shlex.join(words)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_within_a_sentence_has_options_that_there_are(document: Path, monkeypatch: pytest.MonkeyPatch):
    """What it needs besides may be left out."""
    monkeypatch.setattr("vlm.train.engines.deepspeed_settings.read_json", lambda path: {})
    for span in re.findall(r"`vlm ([a-z][^`\n]*)`", document.read_text(encoding="utf-8")):
        with suppress(typer.BadParameter):
            check_vlm(shlex.split(re.sub(r"\$[A-Z_]+", "2", span)))


def test_what_stands_beside_another_trainers_commands_is_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "vlm.train.engines.deepspeed_settings.read_json", lambda path: {"zero_optimization": {"stage": 2}}
    )
    text = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
    ours = [row.split(" | ", 1)[1] for row in re.findall(r"^\| (`.*|[a-z.].*) \|$", text, re.MULTILINE) if " | " in row]
    spans = [span for cell in ours for span in re.findall(r"`([^`]+)`", cell)]
    commands = [span for span in spans if re.match(r"(NPROC_PER_NODE=8 )?vlm |python \w+\.py|torchrun ", span)]
    assert len(commands) > 40
    shipped = {name for path in shipped_projects() for name in (path, path.partition("/")[0])}
    for command in commands:
        overrides = check([word.replace("STEP", "600") for word in command.split()])
        assert all(is_key(override.partition("=")[0]) for override in overrides), command
        named = re.search(r"vlm (?:train|plan|cp) ([a-z0-9_]+(?:/[a-z0-9_]+)?)(?: |$)", command)  # a shipped project
        assert named is None or named[1] in shipped, command
    assert any("minigpt4qwen/finetune_qwen1_14b" in command for command in commands)
    keys = [span.partition(":")[0] for span in spans if re.match(r"(model|data|train|engine)\.", span)]
    assert len(keys) > 60
    assert [key for key in keys if not is_key(key)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_link_leads_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_chinese_readme_has_the_blocks_and_documents_of_the_english_one():
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES)
    assert list(commands(chinese)) == list(commands(english))
    other = re.compile(r"^```(?!bash)\w+\n.*?^```", re.MULTILINE | re.DOTALL)
    assert other.findall(chinese) == other.findall(english)
    listed = re.compile(r"^\| \[(docs/[\w-]+\.md)\]", re.MULTILINE)
    assert listed.findall(chinese) == listed.findall(english)
    assert set(listed.findall(english)) == {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}
    assert chinese.count("\n## ") == english.count("\n## ")


@pytest.mark.parametrize(
    "wrong",
    [
        "vlm train CONFIG --nprocs 2",
        "vlm trian CONFIG",
        "torchrun --nproc_per_gpu=2 train.py --cfg-path CONFIG",
        "torchrun --nproc_per_node=2 train.py --cfg-path CONFIG --stages 2",
        "python scripts/prove_engines.py CONFIG --number 8",
        "make quickstrat",
        "vlm train CONFIG --deepspeed zero4",
    ],
)
def test_a_wrong_command_is_found(wrong: str):
    with pytest.raises(BaseException):  # noqa: B017, PT011 - argparse exits, the others raise
        check(wrong.split())


def test_a_wrong_key_is_found():
    assert all(map(is_key, ("engine.stage", "model.lora.rank", "data.sources[0].path")))
    assert not any(map(is_key, ("engine.stages", "data.sources[0].paths")))
    (words,) = commands("```bash\nvlm plan CONFIG [--gpus 2] --options engine.cuts=[13] # a comment\n```\n")
    assert words == ["vlm", "plan", "CONFIG", "--gpus", "2", "--options", "engine.cuts=[13]"]
    assert check(words) == ["engine.cuts=[13]"]
