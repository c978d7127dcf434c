import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from vlm.batch import Batch
from vlm.errors import Preempted, TrainingDiverged
from vlm.train.engines.base import StepOutput
from vlm.train.interrupt import StopRequest
from vlm.train.loop import Every, TrainLoop
from vlm.train.timing import StepTimer


class Objective:
    metric_names = ("accuracy",)

    def normalizer(self, batch):
        return batch.num_supervised


class Engine:
    """Remembers what it was asked; the loss of step n is n."""

    data_rank, num_data_ranks = 0, 1
    loss_scale = None

    def __init__(self, bad=()):
        self.calls, self.bad = [], bad
        self.timer = StepTimer()

    def broadcast(self, batches):
        return batches

    def train_step(self, microbatches, weight, learning_rate):
        self.calls.append((len(microbatches), weight, learning_rate))
        if len(self.calls) in self.bad:
            return StepOutput(loss=math.nan, grad_norm=math.nan, applied=False)
        return StepOutput(loss=float(len(self.calls)), grad_norm=1.0, applied=True)

    def sum_over_data_ranks(self, values):
        return values

    def gather_from_data_ranks(self, value):
        return [value]


class Stream:
    def iterate(self, start_step):
        while True:
            row = torch.tensor([[1, 2, 3]])
            yield [Batch(row, torch.tensor([[-100, 2, 3]]), row, where=["a.json: record 7"])] * 2


def loop(engine, **kwargs):
    events = []
    defaults = {
        "engine": engine,
        "objective": Objective(),
        "stream": Stream(),
        "schedule": lambda step: 0.1 * step,
        "max_steps": 5,
        "report": lambda step, *rest: events.append(("report", step)),
        "save": lambda step, required: events.append(("save", step)) is None,
        "save_every": 2,
    }
    return TrainLoop(**defaults | kwargs), events


def test_the_weight_is_counted_over_all_microbatches_before_the_step():
    engine = Engine()
    train_loop, _ = loop(engine)
    train_loop.run()
    assert engine.calls[0] == (2, 4, 0.0)  # two micro-batches with two supervised tokens each
    assert [rate for _, _, rate in engine.calls] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_it_saves_every_so_often_and_at_the_end_and_starts_where_told():
    train_loop, events = loop(Engine())
    train_loop.save = lambda step, required: events.append(("must save" if required else "save", step))
    train_loop.run(start_step=1)
    assert events == [
        ("report", 2), ("save", 2), ("report", 3), ("report", 4), ("save", 4), ("report", 5), ("must save", 5),
    ]  # fmt: skip


def test_a_step_may_update_several_times_and_stops_at_one_that_was_not_applied():
    engine = Engine(bad={4})
    train_loop, events = loop(engine, max_steps=2, updates=3, max_bad_steps=1)
    train_loop.run()
    assert [rate for _, _, rate in engine.calls] == pytest.approx([0, 0, 0, 0.1])
    assert [step for kind, step in events if kind == "report"] == [1, 2]


def test_a_step_in_which_nothing_is_supervised_updates_nothing():
    engine, said = Engine(), []

    def roll(step, batches):
        return [replace(batch, labels=torch.full((1, 3), -100)) if step else batch for batch in batches], {}

    train_loop, _ = loop(engine, max_steps=2, roll=roll)
    train_loop.report = lambda step, batches, output, *rest: said.append((output.loss, dict(output.metrics)))
    train_loop.run()
    assert len(engine.calls) == 1
    assert said[1] == (0.0, {"accuracy": 0.0})


def test_events_run_every_n_steps():
    seen = []
    train_loop, _ = loop(Engine(), events=[Every(2, seen.append), Every(None, seen.append)])
    train_loop.run()
    assert seen == [2, 4]


def test_a_non_finite_loss_stops_before_anything_is_saved_and_names_the_records():
    train_loop, events = loop(Engine(bad={2}))
    with pytest.raises(TrainingDiverged, match=r"step 2: loss nan.*a\.json: record 7"):
        train_loop.run()
    assert events == [("report", 1)]


def test_as_many_bad_steps_pass_as_the_config_allows():
    train_loop, events = loop(Engine(bad={2, 3}), max_bad_steps=2)
    train_loop.run()
    assert ("save", 5) in events
    train_loop, _ = loop(Engine(bad={2, 3}), max_bad_steps=1)
    with pytest.raises(TrainingDiverged):
        train_loop.run()


def test_a_save_that_failed_is_made_again_before_a_stop_is_called_saved():
    stops, saves = [], []

    def save(step, required):
        saves.append((step, required))
        stops.append("SIGTERM")  # it arrives while the disk is full
        return required

    train_loop, _ = loop(Engine(), save=save, save_every=2)
    train_loop.stop_requested = lambda: stops[-1] if stops else None
    with pytest.raises(Preempted):
        train_loop.run()
    assert saves == [(2, False), (2, True)]


def test_a_signal_lets_the_step_finish_saves_once_and_ends_with_143():
    with StopRequest() as stop:

        def report(step, *rest):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        saved = []

        def save(step, required):
            assert required
            os.kill(os.getpid(), signal.SIGTERM)  # a second one, while saving
            os.kill(os.getpid(), signal.SIGINT)
            saved.append(step)
            return True

        train_loop, _ = loop(Engine(), report=report, save=save, save_every=100)
        train_loop.stop_requested = lambda: stop.signal_name
        with pytest.raises(Preempted, match="stopped after step 3") as caught:
            train_loop.run()
    assert saved == [3]
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
