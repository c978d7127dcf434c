"""`vlm data repeat | split | convert`: data files made of data files, without a config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from vlm.data.config import SourceConfig
from vlm.errors import ConfigError

if TYPE_CHECKING:
    from vlm.data.rewrite import Rewritten

_NUM_SHOWN = 20  # skipped records that are printed

Input = Annotated[Path, typer.Option("-i", "--input", help="Any file or folder that data.sources can name.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="A new .json or .jsonl file.")]
Format = Annotated[str, typer.Option(help="As data.sources[].format.")]
Dataset = Annotated[str | None, typer.Option(help="Which entry of a dataset_info.json.")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="Other names of keys, ours=theirs; repeatable.")]
Roles = Annotated[list[str] | None, typer.Option("--role", help="Other names of roles, theirs=ours; repeatable.")]


def register(app: typer.Typer) -> None:
    for command in (repeat, split, convert):
        app.command()(command)


def repeat(
    input: Input,
    output: Output,
    number: Annotated[int, typer.Option("-n", help="How often each record is written.")],
) -> None:
    """Write every record of a file several times. In a config, data.sources[].weight does it without a copy."""
    source = _source(input)
    from vlm.data.rewrite import repeat_records

    _tell(repeat_records(source, output, number))


def split(
    input: Input,
    train: Annotated[Path | None, typer.Option(help="Default: beside the input, NAME.train.jsonl.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Default: beside the input, NAME.held_out.jsonl.")] = None,
    share: Annotated[float, typer.Option(help="Of the records to hold out.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    format: Format = "auto",
    dataset: Dataset = None,
    column: Columns = None,
    role: Roles = None,
) -> None:
    """Split a file into training and held-out records, so that no image stands in both."""
    source = _source(input, format, dataset, column, role)
    stem = input.with_suffix("").with_suffix("") if input.suffix == ".gz" else input.with_suffix("")
    train = train or stem.with_name(f"{stem.name}.train.jsonl")
    held_out = held_out or stem.with_name(f"{stem.name}.held_out.jsonl")
    from vlm.data.rewrite import split_records

    _tell(split_records(source, train, held_out, share=share, seed=seed))


def convert(
    input: Input,
    output: Output,
    to: Annotated[str, typer.Option(help="llava, openai or sharegpt.")],
    format: Format = "auto",
    dataset: Dataset = None,
    column: Columns = None,
    role: Roles = None,
    prompt: Annotated[str | None, typer.Option(help="What a caption or text answers.")] = None,
    image_placement: Annotated[str, typer.Option(help="exact or auto, as data.image_placement.")] = "auto",
) -> None:
    """Write records of any format that training reads in the layout of another program."""
    source = _source(input, format, dataset, column, role, prompt)
    if image_placement not in ("exact", "auto"):
        raise ConfigError(f"--image-placement {image_placement}: expected exact or auto")
    from vlm.data.rewrite import convert_records

    _tell(convert_records(source, output, to, image_placement))


def _source(
    path: Path, format: str = "auto", dataset: str | None = None, columns: list[str] | None = None,
    roles: list[str] | None = None, prompt: str | None = None,
) -> SourceConfig:  # fmt: skip
    values = {
        "path": str(path), "format": format, "dataset": dataset, "prompt": prompt,
        "columns": dict(_pair("--column", text) for text in columns or ()),
        "roles": dict(_pair("--role", text) for text in roles or ()),
    }  # fmt: skip
    try:
        return SourceConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _pair(flag: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ConfigError(f"{flag} {text}: expected two names with = between them, such as {flag} image=img_path")
    return key, value


def _tell(result: Rewritten) -> None:
    for skip in result.skips[:_NUM_SHOWN]:
        print(f"{skip.where}: [{skip.rule}] {skip.message}")
    if len(result.skips) > _NUM_SHOWN:
        print(f"... and {len(result.skips) - _NUM_SHOWN} more")
    for line in result.lines():
        print(line)
