"""The `vlm` command. Verbs live in the modules beside this one; heavy packages are imported inside them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from vlm import __version__
from vlm.cli import chat, checkpoints, configs, data, doctor, export, train
from vlm.errors import VLMError

app = typer.Typer(
    help="Assemble any vision encoder with any language model, train the result, talk to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (configs, train, export, chat):
    module.register(app)
app.add_typer(data.app, name="data", help="Look at training data without a model.")
app.add_typer(checkpoints.app, name="ckpt", help="List and verify the checkpoints of a run.")
doctor.register(app)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `vlm`. Ends the process with the exit code of `vlm.errors`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(lambda: app(with_hyphens(given), standalone_mode=False)))


def run(command: Callable[[], object]) -> int:
    """Run a command; errors of ours become a message and an exit code, without a traceback."""
    import click

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning when loader processes start
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except VLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """Accept flags with underscores too: `--cfg_path x` is `--cfg-path x`. Values are left alone.

    >>> with_hyphens(["--max_shard_size=2GB", "a_b"])
    ['--max-shard-size=2GB', 'a_b']
    """
    spelled = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        spelled.append(flag.replace("_", "-") + equals + value if flag.startswith("--") else argument)
    return spelled


if __name__ == "__main__":
    main()
