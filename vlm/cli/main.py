"""The `vlm` command. Verbs live in the modules beside this one; heavy packages are imported inside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from vlm.cli import (
    adopt,
    chat,
    ckpt,
    configs,
    convert,
    data,
    doctor,
    export,
    importing,
    merge,
    models,
    plan,
    predict,
    prove,
    runs,
    serve,
    studio,
    train,
    webui,
)  # fmt: skip
from vlm.cli.process import end, repeat_options, run, with_hyphens
from vlm.version import __version__

app = typer.Typer(
    help="Assemble any vision encoder with any language model, train the result, talk to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = (
    *(configs, adopt, models, plan, prove, train, runs, predict, export),
    *(merge, convert, importing, chat, webui, studio, serve),
)
for module in _COMMANDS:
    module.register(app)
app.add_typer(data.app, name="data", help="Look at training data without a model, rewrite it; encode its images ahead.")
app.add_typer(convert.app, name="convert", help="Rewrite models of other programs and times as native ones.")
app.add_typer(ckpt.app, name="ckpt", help="List and verify the checkpoints of a run.")
doctor.register(app)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `vlm`. Ends the process with the exit code of `vlm.errors`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end(run(lambda: app(repeat_options(with_hyphens(given)), standalone_mode=False)))


if __name__ == "__main__":
    main()
