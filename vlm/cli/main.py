"""The `vlm` command. Verbs live in the modules beside this one; heavy packages are imported inside them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from vlm import __version__
from vlm.cli import chat, ckpt, configs, data, doctor, export, plan, prove, serve, train, webui
from vlm.errors import DistributedError, Preempted, VLMError
from vlm.launch import launched_rank

app = typer.Typer(
    help="Assemble any vision encoder with any language model, train the result, talk to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (configs, plan, prove, train, export, chat, webui, serve):
    module.register(app)
app.add_typer(data.app, name="data", help="Look at training data without a model; encode its images ahead.")
app.add_typer(ckpt.app, name="ckpt", help="List and verify the checkpoints of a run.")
doctor.register(app)

# A launcher ends all processes as soon as one has ended, and reports that one. So rank 0 gets this long to say what
# happened, and the launcher to notice a rank that was lost before those that miss it end.
_SECONDS_FOR_THE_OTHERS = 3.0
_OPTION_FLAGS = ("--options", "--cfg-options", "-o")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `vlm`. Ends the process with the exit code of `vlm.errors`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end(run(lambda: app(repeat_options(with_hyphens(given)), standalone_mode=False)))


def end(code: int) -> NoReturn:
    """End the process. One that has talked with others ends at once, without winding the interpreter down.

    Threads of the communication library that were still running then have aborted ranks whose work was done.
    """
    distributed: Any = sys.modules.get("vlm.distributed")
    if distributed is not None and distributed.has_met_others:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(command: Callable[[], object]) -> int:
    """Run a command; errors of ours become a message on standard error and an exit code, without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning when loader processes start
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        result = command()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except VLMError as error:
        rank = launched_rank()
        if rank == 0 or not error.everywhere:  # else rank 0 says it
            kind = "" if isinstance(error, Preempted) else "error: "  # that was asked for
            print(f"{f'[rank {rank}] ' if rank else ''}{kind}{error}", file=sys.stderr)
        if isinstance(error, DistributedError) or (rank > 0 and error.everywhere):
            time.sleep(_SECONDS_FOR_THE_OTHERS)
        return error.exit_code
    except typer.Exit as end:
        return end.exit_code
    except TyperException as error:  # a wrong flag or argument
        error.show() if hasattr(error, "show") else print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vlm ls | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return 0
    except Exception:
        traceback.print_exc()
        return 1


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """Accept flags with underscores too: `--cfg_path x` is `--cfg-path x`. Values are left alone.

    >>> with_hyphens(["--max_shard_size=2_GB", "a_b", "--local_rank", "0"])
    ['--max-shard-size=2_GB', 'a_b', '--local-rank', '0']
    """
    spelled = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        spelled.append(flag.replace("_", "-") + equals + value if flag.startswith("--") else argument)
    return spelled


def repeat_options(arguments: Sequence[str]) -> list[str]:
    """Let one `--options` take several overrides, as launch scripts write them.

    >>> repeat_options(["train", "a.yaml", "--options", "x=1", "y=2", "--out", "b=c"])
    ['train', 'a.yaml', '--options', 'x=1', '--options', 'y=2', '--out', 'b=c']
    """
    spelled: list[str] = []
    number_after = None  # overrides seen since the last --options; None elsewhere
    for argument in arguments:
        if argument in _OPTION_FLAGS:
            number_after = 0
        elif number_after is not None:
            if argument.startswith("-") or (number_after and "=" not in argument):
                number_after = None
            else:
                if number_after:
                    spelled.append("--options")
                number_after += 1
        spelled.append(argument)
    return spelled


if __name__ == "__main__":
    main()
