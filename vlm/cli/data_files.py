"""`vlm data repeat | split | convert`: data files made of data files, without a config; `vlm data make`, of images."""

from __future__ import annotations

import os
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
    for command in (repeat, split, convert, make):
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


def make(
    images: Annotated[Path, typer.Argument(help="A folder of images.")],
    api_base: Annotated[str, typer.Option(help="An OpenAI-compatible API, such as http://127.0.0.1:8000/v1.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .jsonl file; an own one is gone on with.")],
    prompt: Annotated[
        Path | None, typer.Option(help="What is asked; default: OUTPUT.prompt.txt, to be edited.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Default: the server's first.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the API's key.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Questions about each image.")] = 3,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests of this start, tries included.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 1000,
    max_side: Annotated[int, typer.Option(min=16, help="Pixels of the longer side of what is sent.")] = 1024,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling.")] = 0.7,
    free_form: Annotated[bool, typer.Option(help="Send no JSON schema, for servers that know none.")] = False,
) -> None:
    """Ask a vision model for question-answer pairs about your own images. The same command goes on where it ended."""
    if not images.is_dir():
        raise ConfigError(f"{images} is not a folder of images")
    if output.suffix != ".jsonl":
        raise ConfigError(f"{output}: records are appended one by one, so that it must be a .jsonl file")
    key = None if api_key_env is None else os.environ.get(api_key_env)
    if api_key_env is not None and not key:
        raise ConfigError(f"--api-key-env {api_key_env}: that environment variable is not set")
    from vlm.data.make import MakeSettings, make_records

    settings = MakeSettings(
        api_base, model, key, pairs, max_requests, max_tokens, max_side, parallel,
        has_form=not free_form, temperature=temperature,
    )  # fmt: skip
    for line in make_records(images, output, prompt or output.with_suffix(".prompt.txt"), settings).lines():
        print(line)
    print(f"images are named from {images}: set data.sources[].images: {images}")


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
