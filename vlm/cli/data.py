"""`vlm data check | preview | stats`: the data as training will see it, without a model; `vlm data cache`.

Those that write data files are in `vlm.cli.data_files`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm.cli import data_files
from vlm.cli.configs import Config, Options
from vlm.cli.options import AsJson
from vlm.cli.train import Endpoint, Nnodes, Nproc, launched
from vlm.config import RunConfig
from vlm.config_checks import load_checked
from vlm.logs import is_logging_rank

if TYPE_CHECKING:
    from vlm.batch import ImageSpec
    from vlm.data.tokenize import ConversationTokenizer

app = typer.Typer(no_args_is_help=True)
data_files.register(app)
_READ = ("model", "data")  # sections of the config whose paths must exist


@app.command()
def check(
    config: Config,
    options: Options = None,
    limit: Annotated[int, typer.Option(help="Bad records to print; all go to the file.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write all bad records here, as JSON lines.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go through every record and decode every image. Exit code 3 when more are bad than the config allows."""
    checked = load_checked(config, options or (), _READ, ("tokenizer",))
    from vlm.data.report import check_records

    tokenizer, spec = _tokenizer_and_spec(checked)
    reads = checked.objective.reads
    check_records(checked.data, tokenizer, spec, limit=limit, out=out, reads=reads, as_json=as_json)


@app.command()
def preview(
    config: Config,
    options: Options = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Records to show.")] = 5,
    out: Annotated[Path, typer.Option(help="Contact sheet of what the encoder will see.")] = Path("preview.png"),
) -> None:
    """Print records with their supervised tokens coloured, and save their images as the encoder will see them."""
    checked = load_checked(config, options or (), _READ, ("tokenizer",))
    from vlm.data.report import preview_records

    tokenizer, spec = _tokenizer_and_spec(checked)
    preview_records(checked.data, tokenizer, spec, number=number, out=out, reads=checked.objective.reads)


@app.command()
def stats(config: Config, options: Options = None, as_json: AsJson = False) -> None:
    """Histograms of lengths and turns, and how full packed rows are."""
    checked = load_checked(config, options or (), _READ, ("tokenizer",))
    from vlm.data.report import print_stats

    tokenizer, _ = _tokenizer_and_spec(checked)
    print_stats(checked.data, tokenizer, seed=checked.seed, reads=checked.objective.reads, as_json=as_json)


@app.command()
def cache(
    config: Config,
    options: Options = None,
    nproc: Nproc = None,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
) -> int:
    """Encode every image ahead of training, as data.cache_features does. The same command goes on where it ended."""
    chosen = list(options or ())
    code = launched(["data", "cache", config], chosen, nproc, nnodes, rdzv_endpoint)
    if code is not None:
        return code
    checked = load_checked(config, chosen)
    from vlm.run import fill_cache

    text = fill_cache(checked)
    if is_logging_rank():
        print(text)
    return 0


def _tokenizer_and_spec(config: RunConfig) -> tuple[ConversationTokenizer, ImageSpec | None]:
    """From config files and shapes alone; no weights are loaded."""
    from vlm.data.build import build_conversation_tokenizer
    from vlm.models.build import build_image_spec
    from vlm.models.llm import IMAGE_TOKEN, load_tokenizer

    spec = build_image_spec(config.model)
    tokenizer = load_tokenizer(config.model.llm.path, config.model.trust_remote_code)
    image_token_id = None if spec is None else tokenizer.get_vocab()[IMAGE_TOKEN]
    return build_conversation_tokenizer(config.data, tokenizer, spec, image_token_id), spec
