"""Look at a pair, write its project, and say what was found."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vlm.adopt.drawn import write_drawn
from vlm.adopt.encoders import Backend
from vlm.adopt.look import Line, Pair, look
from vlm.adopt.project import FINETUNE, LORA, PRETRAIN, TRIAL, Sources, stages, write_project
from vlm.config import RunConfig, load_config
from vlm.config_checks import load_checked
from vlm.errors import ConfigError, VLMError
from vlm.plan.alternatives import alternatives, largest_micro_batch
from vlm.plan.estimate import estimate
from vlm.plan.memory import device_memory, parse_memory, usable
from vlm.plan.report import verdict
from vlm.plan.shapes import ModelShape, read_shapes
from vlm.precision import fast_precision
from vlm.train.engines.device import choose_device

README = "README.md"
_DATA = "data"
_NUM_STAGES = 2  # of the pipeline whose cut is shown


class Adopted(NamedTuple):
    folder: Path
    lines: tuple[Line, ...]
    commands: tuple[str, ...]


class _Memory(NamedTuple):
    bytes: int
    name: str
    is_here: bool


def adopt(
    encoders: Sequence[str], llm: str, folder: Path, *, backend: Backend | None = None, pretrained: str | None = None,
    template: str | None = None, memory: str | None = None, data: str | None = None, images: str | None = None,
) -> Adopted:  # fmt: skip
    """Write a project for encoders and a language model.

    Args:
        folder: is made; it may be there and empty.
        memory: of the device to train on, such as 24GiB; None takes what is here.
        data: a data file of both stages; None lets drawn images stand in its place.
        images: the folder of its images.

    Raises:
        ConfigError: the two cannot be trained together, with all reasons; or `folder` holds something. Nothing is
            written then.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already and is not empty; name another folder, or remove it")
    if images is not None and data is None:
        raise ConfigError(f"--images {images}: of which data? Add --data FILE")
    room = _memory_of(memory)
    pair = look(encoders, llm, backend=backend, pretrained=pretrained, template=template)
    with _removed_on_error(folder):
        drawn = Sources.drawn(folder / _DATA)
        write_drawn(folder / _DATA)
        sources = drawn if data is None else Sources(data, data, images, are_drawn=False)
        write_project(folder, pair, sources, drawn, {})
        shape = read_shapes(load_config(folder / TRIAL).model)
        rows, fits = _fit(folder, pair, room, shape)
        if rows:
            write_project(folder, pair, sources, drawn, rows)
        for name in (TRIAL, PRETRAIN):
            load_checked(str(folder / name))
        lines = (*pair.lines, _pipeline_line(folder, pair, shape), *fits)
        commands = tuple(_commands(folder, pair, data is None))
        (folder / README).write_text(_readme(folder, pair, lines, commands), encoding="utf-8")
    return Adopted(folder, lines, commands)


def as_text(adopted: Adopted) -> str:
    """For a terminal: what was found, what cannot be done, and the next commands."""
    width = max(len(line.topic) for line in adopted.lines)
    found = [f"{line.topic:<{width}}  {line.text}" for line in adopted.lines if line.text]
    limits = [
        f"  {line.topic}: {line.limit}{f' -> {line.advice}' if line.advice else ''}"
        for line in adopted.lines
        if line.limit
    ]
    if limits:
        limits = ["", "what it cannot do, or not as well:", *limits]
    return "\n".join([*found, *limits, "", f"{adopted.folder}: written; next:", *map("  {}".format, adopted.commands)])


def _fit(folder: Path, pair: Pair, room: _Memory, shape: ModelShape) -> tuple[dict[str, int], list[Line]]:
    """Rows per forward of stages that need fewer than usual, and a line for each stage."""
    rows: dict[str, int] = {}
    lines = []
    for name in stages(pair):
        config = _settled(load_config(folder / name), room)
        size = largest_micro_batch(config, 1, room.bytes, shape)
        if size is not None and size < config.train.micro_batch_size:
            rows[name] = size
            config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": size})})
        lines.append(_fit_line(Path(name).stem, config, room, shape))
    return rows, lines


def _fit_line(topic: str, config: RunConfig, room: _Memory, shape: ModelShape) -> Line:
    plan = estimate(config, 1, shape=shape)
    said = verdict(plan, room.bytes)
    if plan.peak <= usable(room.bytes):
        rows = plan.micro_batch_size
        return Line(topic, f"{said.partition(' (')[0]}, {room.name}; {rows} row{'s' * (rows > 1)} at once")
    others = alternatives(config, 1, room.bytes, shape, limit=1)
    if not others:
        return Line(topic, limit=f"{said}, {room.name}", advice="a smaller model, or more devices: vlm plan")
    change = others[0].change
    devices = others[0].plan.world_size
    advice = f"{change.name} would, with {'; '.join(change.yaml_lines())}" + (
        f" on {devices} devices" if devices > 1 else ""
    )
    return Line(topic, limit=f"{said}, {room.name}", advice=advice)


def _settled(config: RunConfig, room: _Memory) -> RunConfig:
    """With the precision that `auto` would take, as `vlm plan` has it."""
    chosen = fast_precision(choose_device(config.engine.device)) if room.is_here else "bf16"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": chosen})})


def _memory_of(memory: str | None) -> _Memory:
    if memory is not None:
        return _Memory(parse_memory(memory), "as --memory says", is_here=False)
    return _Memory(*device_memory("auto", 1), is_here=True)


def _pipeline_line(folder: Path, pair: Pair, shape: ModelShape) -> Line:
    """Where the fullest stage would be smallest."""
    if pair.why_no_pipeline:
        return Line("pipeline", limit=pair.why_no_pipeline)
    name = LORA if pair.has_linears else FINETUNE
    try:
        config = load_config(folder / name, ["engine.kind=pipeline", f"engine.num_stages={_NUM_STAGES}"])
        cuts = estimate(config, _NUM_STAGES, shape=shape).cuts
    except VLMError as error:
        return Line("pipeline", limit=str(error))
    where = ", ".join(map(str, cuts))
    layers = len(shape.llm.blocks) + 2
    return Line("pipeline", f"{layers} layers, inputs and output counted; {_NUM_STAGES} stages are cut before {where}")


def _commands(folder: Path, pair: Pair, needs_data: bool) -> Iterator[str]:
    runs = f"cache/runs/{folder.resolve().name}"
    last = Path(LORA if pair.has_linears else FINETUNE)
    files = {name: shlex.quote(str(folder / name)) for name in (PRETRAIN, FINETUNE, TRIAL, last.name)}
    first, second = (shlex.quote(f"{runs}/{stage}") for stage in (Path(PRETRAIN).stem, last.stem))
    yield f"vlm prove {files[TRIAL]}   # with the weights: nothing is assumed"
    yield f"vlm train {files[TRIAL]}   # two steps on drawn images, to see the whole way"
    if needs_data:
        yield f"$EDITOR {files[PRETRAIN]} {files[FINETUNE]}   # data.sources: your own data"
    yield f"vlm train {files[PRETRAIN]}"
    yield f"vlm export {first}"
    yield f"vlm train {files[last.name]}"
    yield f"vlm export {second}"
    yield f"vlm chat {shlex.quote(f'{runs}/{last.stem}/export')} --image cat.png"


def _readme(folder: Path, pair: Pair, lines: Sequence[Line], commands: Sequence[str]) -> str:
    names = {PRETRAIN: "the projector, on captions", FINETUNE: "projector and language model, on conversations"}
    if pair.has_linears:
        names[LORA] = "the same with adapters: far less memory"
    names[TRIAL] = "two steps on drawn images"
    found = [f"| {line.topic} | {_cell(line.text)} |" for line in lines if line.text]
    limits = [f"| {line.topic} | {_cell(line.limit)} | {_cell(line.advice)} |" for line in lines if line.limit]
    text = [
        f"# {folder.resolve().name}",
        "",
        "Written by `vlm adopt`, from the shapes and text files of both models. `vlm prove` looks at the weights too.",
        "",
        "| found | |", "|---|---|", *found,
    ]  # fmt: skip
    if limits:
        text += ["", "| cannot | why | what to do |", "|---|---|---|", *limits]
    text += ["", "| file | trains |", "|---|---|", *(f"| {name} | {what} |" for name, what in names.items())]
    return "\n".join([*text, "", "```bash", *commands, "```"]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Make a folder; whatever goes wrong, nothing of it stays."""
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); name another folder") from None
    try:
        yield
    except BaseException:
        # of one that was there only what it holds: `.` and a link cannot be removed themselves
        for each in folder.iterdir() if was_there else [folder]:
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            else:
                each.unlink(missing_ok=True)
        raise
