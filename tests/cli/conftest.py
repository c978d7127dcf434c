"""Commands run in this process; `vlm(...)` returns (exit code, standard output, standard error)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlm.cli.main import main

Vlm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vlm(capsys: pytest.CaptureFixture[str]) -> Vlm:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run
