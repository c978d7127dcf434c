import json
import os
import sys
import threading
import time

import pytest
from warm import started

from vlm.errors import ConfigError, RunLocked
from vlm.logs import copied_to, log, log_level, warn
from vlm.train.runfolder import RunFolder


def hold(path: str) -> None:
    with RunFolder(path):
        print("held", flush=True)
        time.sleep(3600)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_told_whose_it_is(tmp_path):
    run = tmp_path / "run"
    with started(hold, str(run)) as holder:
        while holder.output != "held\n":
            assert holder.codes == [None], holder.output
            time.sleep(0.02)
        with pytest.raises(RunLocked, match=f"process {holder.processes[0].pid}"), RunFolder(run):
            pass
        holder.kill()
    with RunFolder(run):  # the lock of a killed process is taken over
        assert json.loads((run / "run.owner.json").read_text())["pid"] == os.getpid()


def test_a_reader_that_looks_for_a_moment_does_not_refuse_a_run(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    reader = (tmp_path / "run.lock").open("wb")
    fcntl.flock(reader, fcntl.LOCK_SH)
    threading.Timer(0.1, reader.close).start()
    with RunFolder(tmp_path):
        assert reader.closed


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"), RunFolder(tmp_path / "run"):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"thesis.tex"), RunFolder(tmp_path):
        pass


def test_an_output_dir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(ConfigError, match="Permission denied"), RunFolder(tmp_path / "run"):
        pass


def test_rewind_drops_lines_past_the_step_and_a_torn_last_line(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        for step in (1, 2, 3):
            run.append("metrics.jsonl", {"step": step})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "lo')
        with (run.path / "metrics.jsonl").open("ab") as file:
            file.write("狗".encode()[:2])  # the kill came in the middle of a character
        run.rewind("metrics.jsonl", 2)
        assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_temporary_folders_of_an_interrupted_save_are_cleaned_at_the_next_start(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/.tmp-step-000010-abc").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with RunFolder(run):
        assert list((run / "checkpoints").iterdir()) == []


def test_lines_of_the_console_are_added_to_a_file_but_not_twice_to_one_that_is_the_console(tmp_path, monkeypatch):
    path = tmp_path / "train.log"
    path.write_text("before\n")
    with log_level("warning"), copied_to(path):
        log("not shown, so not kept")
        warn("careful")
    log("after")
    assert path.read_text() == "before\nwarning: careful\n"
    with path.open("a") as console:
        monkeypatch.setattr(sys, "stderr", console)
        with copied_to(path):
            log("once")
    assert path.read_text().count("once") == 1
