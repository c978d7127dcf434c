from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.artifacts.folder import replace_folder
from vlm.errors import ConfigError

WRITE = """
import sys
from pathlib import Path
from vlm.artifacts.folder import replace_folder
from vlm.faults import fault
with replace_folder(Path(sys.argv[1])) as folder:
    (folder / "vlm.json").write_text("new")
    fault("export:weights")
    (folder / "weights").write_text("new")
"""


def write(final: Path, text: str) -> None:
    with replace_folder(final) as folder:
        (folder / "vlm.json").write_text(text)
        (folder / "weights").write_text(text)


def write_half(final: Path, error: Exception) -> None:
    with replace_folder(final) as folder:
        (folder / "vlm.json").write_text("new")
        raise error


def contents(parent: Path) -> dict[str, str]:
    return {str(path.relative_to(parent)): path.read_text() for path in parent.rglob("*") if path.is_file()}


def test_the_folder_is_there_only_at_the_end(tmp_path: Path):
    with replace_folder(tmp_path / "export") as folder:
        (folder / "vlm.json").write_text("x")
        assert not (tmp_path / "export").exists()
    assert contents(tmp_path) == {"export/vlm.json": "x"}


def test_an_error_half_way_leaves_the_old_export_and_nothing_else(tmp_path: Path):
    write(tmp_path / "export", "old")
    with pytest.raises(OSError, match="disk"):
        write_half(tmp_path / "export", OSError("disk full"))
    assert contents(tmp_path) == {"export/vlm.json": "old", "export/weights": "old"}


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("export:weights", {"old"}),  # killed while writing
        ("export:rename", {"old"}),  # everything written, not yet in place
        ("export:swap", set()),  # between the two renames: no export at all, never half of one
    ],
)
def test_kill_9_never_leaves_half_an_export_and_the_next_one_cleans_up(tmp_path: Path, point: str, left: set[str]):
    final = tmp_path / "export"
    write(final, "old")
    environment = {**os.environ, "VLM_FAULT": f"{point}=kill"}
    killed = subprocess.run([sys.executable, "-c", WRITE, str(final)], env=environment, check=False)
    assert killed.returncode == -9
    assert set(contents(final).values()) == left
    with pytest.raises(OSError, match="again"):
        write_half(final, OSError("again"))
    assert contents(final) == {"vlm.json": "old", "weights": "old"}  # put back if it was moved away
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_is_no_export_is_not_overwritten(tmp_path: Path):
    final = tmp_path / "thesis"
    final.mkdir()
    (final / "thesis.tex").write_text("ten years")
    with pytest.raises(ConfigError, match=r"no vlm\.json in it"), replace_folder(final):
        pass
    assert contents(tmp_path) == {"thesis/thesis.tex": "ten years"}


def test_an_empty_folder_may_be_given(tmp_path: Path):
    (tmp_path / "export").mkdir()
    write(tmp_path / "export", "x")
    assert contents(tmp_path / "export") == {"vlm.json": "x", "weights": "x"}
