"""A checkpoint is copied in its step and written by a thread."""

import threading
from types import SimpleNamespace

import pytest

from vlm.errors import CheckpointError
from vlm.train.checkpoint import checkpoint_folder
from vlm.train.config import TrainConfig
from vlm.train.saving import CheckpointWriter


class State:
    """Of a run; a copy is written once `disk` lets it."""

    def __init__(self, run, num_bytes=0):
        self.run, self.disk, self.done = run, threading.Event(), []
        self.engine = SimpleNamespace(num_copied_bytes=lambda: num_bytes)

    def save(self, step, keep_last):
        self.done.append(f"{step} in its step")
        return checkpoint_folder(self.run, step)

    def copy(self, step, keep_last):
        def write():
            assert self.disk.wait(10)
            if step == 13:
                raise OSError(28, "No space left on device")
            if step == 14:
                raise RuntimeError("a bug")
            self.done.append(f"{step} beside")
            return checkpoint_folder(self.run, step)

        return write


def writer_of(state, **settings):
    return CheckpointWriter(state, TrainConfig(max_steps=20, **settings))


def test_steps_go_on_while_a_checkpoint_is_written_and_the_next_save_waits_for_it(tmp_path):
    state = State(tmp_path)
    writer = writer_of(state)
    assert writer.save(10, required=False) is None  # not there yet
    writer.look(11)
    assert state.done == []
    threading.Timer(0.1, state.disk.set).start()
    assert writer.save(12, required=True) == checkpoint_folder(tmp_path, 12)
    assert state.done == ["10 beside", "12 in its step"]


def test_a_signal_during_a_save_waits_for_that_one_and_writes_no_other(tmp_path):
    state = State(tmp_path)
    writer = writer_of(state)
    writer.save(10, required=False)
    state.disk.set()
    assert writer.save(10, required=True) == checkpoint_folder(tmp_path, 10)
    writer.close()
    assert state.done == ["10 beside"]


@pytest.mark.parametrize(
    ("step", "policy", "error"),
    [(13, "continue", None), (13, "stop", CheckpointError), (14, "continue", RuntimeError)],
)
def test_an_error_of_the_thread_is_that_of_the_next_step(tmp_path, step, policy, error):
    state = State(tmp_path)
    state.disk.set()
    writer = writer_of(state, on_save_failure=policy)
    writer.save(step, required=False)
    writer._written.exception(10)  # until it is done
    if error is None:
        writer.look(step + 1)
    else:
        with pytest.raises(error, match=r"No space left|a bug"):
            writer.look(step + 1)
    writer.close()
    assert state.done == []


@pytest.mark.parametrize(("num_bytes", "settings"), [(2**60, {}), (0, {"async_save": False})])
def test_what_does_not_fit_into_memory_twice_is_written_in_its_step(tmp_path, num_bytes, settings):
    state = State(tmp_path, num_bytes)
    writer_of(state, **settings).save(10, required=False)
    assert state.done == ["10 in its step"]
