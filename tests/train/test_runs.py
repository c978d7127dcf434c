"""Whole runs of a tiny model: killed, stopped, spoiled and resumed."""

import json
import os
import re
import shutil
import signal
import time
from functools import partial

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file
from warm import run_warm, started

from vlm.config import load_config
from vlm.data.stream import BatchStream
from vlm.errors import CheckpointError, MissingPackageError, Preempted, TrainingDiverged, VLMError
from vlm.export.run import export_run
from vlm.models.trainable import part_weights
from vlm.prepare import assemble_checkpoint
from vlm.run import train
from vlm.train.checkpoint import list_checkpoints, newest_verified
from vlm.train.fragments import read_weights
from vlm.train.metrics import plot_loss


def run_here(path):
    return train(load_config(path), path.read_text())


def run_child(path, fault):
    return run_warm(warm.train, str(path), VLM_FAULT=fault)


def final_weights(run):
    return read_weights(newest_verified(run))


def steps_logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture
def config_file(config_file):
    """Unproven but for the straight run, which these equal: a proof changes nothing."""
    return partial(config_file, train__prove=False)


@pytest.fixture(scope="module")
def straight(config_writer, tmp_path_factory):
    """The uninterrupted run that others must equal."""
    return run_here(config_writer(tmp_path_factory.mktemp("straight"))())


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("fault", ["step@8=kill", "save:shard@10=kill", "save:rename@10=kill", "save:prune@12=kill"])
def test_a_killed_run_resumes_and_ends_equal_to_the_bit(config_file, straight, tmp_path, fault):
    path = config_file()
    code, _ = run_child(path, fault)
    assert code == -9
    run = run_here(path)
    expected, got = final_weights(straight), final_weights(run)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert steps_logged(run) == steps_logged(straight)


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_ends_with_143(config_file, straight):
    path = config_file()
    code, errors = run_child(path, "step@7=term")
    assert code == 143
    assert "stopped after step 7 and saved" in errors
    assert "Traceback" not in errors
    run = run_here(path)
    assert [info.step for info in list_checkpoints(run)] == [10, 12]
    expected, got = final_weights(straight), final_weights(run)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False])
def test_a_signal_during_a_save_does_not_nest_another(config_file, beside):
    code, errors = run_child(config_file(train__async_save=beside), "save:shard@5=term")
    assert code == 143
    stopped = re.findall(r"stopped after step (\d+) and saved", errors)
    assert len(stopped) == 1
    assert stopped == ["5"] or (beside and int(stopped[0]) > 5)  # training went on beside the save


@pytest.mark.slow
def test_a_nan_loss_stops_before_the_update_and_names_the_records(config_file, monkeypatch):
    path = config_file()
    monkeypatch.setenv("VLM_FAULT", "loss@7=nan")
    with pytest.raises(TrainingDiverged, match=r"step 7: loss nan.*finetune\.jsonl: line \d+") as caught:
        run_here(path)
    assert caught.value.exit_code == 4
    run = load_config(path).output_dir
    assert [info.step for info in list_checkpoints(type(path)(run))] == [5]


@pytest.mark.slow
def test_a_bad_step_that_is_allowed_changes_no_weight(config_file, monkeypatch):
    monkeypatch.setenv("VLM_FAULT", "loss@12=nan")
    run = run_here(config_file(train__max_bad_steps=1, train__save_every=11))
    before, after = (read_weights(run / f"checkpoints/step-0000{step}") for step in (11, 12))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_another_model_is_refused_key_by_key_before_it_is_loaded(config_file):
    run_here(config_file(train__max_steps=2))
    path = config_file(model__lora={"rank": 8, "alpha": 8}, train__max_steps=4)
    with pytest.raises(CheckpointError) as caught:
        run_here(path)
    assert "model.lora.rank: 4 -> 8" in str(caught.value)
    assert "model.lora.dropout: 0.1 -> 0.0" in str(caught.value)
    assert "model.projector" not in str(caught.value)


@pytest.mark.slow
def test_a_replaced_base_model_is_refused_at_resume(config_file, tiny, tmp_path):
    shutil.copytree(tiny / "llm", tmp_path / "llm")
    llm = {"path": str(tmp_path / "llm")}
    run = run_here(config_file(model__llm=llm, train__max_steps=2))
    weights = tmp_path / "llm" / "model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[-1] += 0.01
    save_file(tensors, weights, metadata={"format": "pt"})
    again = config_file(model__llm=llm, train__max_steps=4)
    with pytest.raises(CheckpointError, match=r"model\.llm\.path .*llm: model\.safetensors: \w{16} -> \w{16}"):
        run_here(again)
    assert newest_verified(run).name == "step-000002"


@pytest.mark.slow
def test_changed_data_is_refused_at_resume(config_file, tiny, tmp_path):
    run_here(config_file(train__max_steps=2))
    lines = (tiny / "data/finetune.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-5]))
    source = {"path": str(tmp_path / "fewer.jsonl"), "images": str(tiny / "data/images")}
    with pytest.raises(CheckpointError, match="the training data, its order or its tokenization changed"):
        run_here(config_file(data__sources=[source], train__max_steps=4))


@pytest.mark.slow
def test_a_run_goes_on_with_a_copy_of_its_data(config_file, tiny, tmp_path):
    shutil.copytree(tiny / "data", tmp_path / "copy", copy_function=shutil.copy)
    run_here(config_file(train__max_steps=2))
    copied = {"path": str(tmp_path / "copy/finetune.jsonl"), "images": str(tmp_path / "copy/images")}
    run = run_here(config_file(data__sources=[copied], train__max_steps=3))
    assert newest_verified(run).name == "step-000003"


@pytest.mark.slow
def test_a_checkpoint_whose_fingerprint_names_the_images_folder_is_taken(config_file, monkeypatch):
    """As earlier versions wrote it."""
    with monkeypatch.context() as before:
        before.setattr(BatchStream, "fingerprint", BatchStream.earlier_fingerprint)
        run = run_here(config_file(train__max_steps=2))
    old = json.loads((newest_verified(run) / "stream.json").read_text())["fingerprint"]
    assert newest_verified(run_here(config_file(train__max_steps=3))).name == "step-000003"
    assert json.loads((newest_verified(run) / "stream.json").read_text())["fingerprint"] != old


@pytest.mark.slow
def test_a_changed_setting_of_the_data_is_named_at_resume(config_file):
    run_here(config_file(train__max_steps=2))
    with pytest.raises(CheckpointError, match=r"data\.system: None -> 'Be brief\.'\nRestore these values") as caught:
        run_here(config_file(data__system="Be brief.", data__max_length=128, train__max_steps=4))
    assert "data.max_length: 96 -> 128\n" in str(caught.value)


@pytest.mark.slow
def test_a_run_that_is_further_already_says_so(config_file, capsys):
    run_here(config_file(train__max_steps=4))
    run_here(config_file(train__max_steps=2))
    said = capsys.readouterr().err
    assert "beyond train.max_steps 2 already" in said
    assert "done: 4 steps" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_key_of_another_kind_is_told_once(config_file, capsys):
    run_here(config_file(engine={"stage": 3}, train__max_steps=1))
    assert capsys.readouterr().err.count("warning: engine.stage is not used: engine.kind is auto") == 1


@pytest.mark.slow
def test_a_share_that_holds_out_no_record_is_told(config_file, capsys):
    run_here(config_file(train__max_steps=1, data__held_out=1e-9))
    assert "data.held_out 1e-09 of so few records holds out none" in capsys.readouterr().err


@pytest.mark.slow
def test_fewer_records_than_a_step_takes_are_told(config_file, capsys):
    run_here(config_file(train__max_steps=1, train__global_batch_size=128, data__packing=False))
    assert "fewer than one step takes (train.global_batch_size 128)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_longer_schedule_may_be_asked_of_a_finished_run(config_file):
    run_here(config_file(train__max_steps=2))
    run = run_here(config_file(train__max_steps=4))
    assert [step for step, _ in steps_logged(run)] == [1, 2, 3, 4]


def test_out_of_memory_names_the_three_settings_to_change(config_file, monkeypatch):
    monkeypatch.setenv("VLM_FAULT", "loss@2=oom")
    settings = r"micro_batch_size \(now 2\).*gradient_checkpointing \(now false\).*max_length \(now 96"
    with pytest.raises(VLMError, match=rf"take about 0\.0 GiB.*{settings}"):
        run_here(config_file())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_costs_the_checkpoint_or_the_run_as_the_config_says(config_file, monkeypatch, policy):
    monkeypatch.setattr("vlm.train.resume.save_checkpoint", _disk_full_at(10))
    path = config_file(train__on_save_failure=policy)
    if policy == "stop":
        with pytest.raises(CheckpointError, match="No space left"):
            run_here(path)
    else:
        run_here(path)
    steps = [info.step for info in list_checkpoints(type(path)(load_config(path).output_dir))]
    assert steps == ([5] if policy == "stop" else [5, 12])


def _disk_full_at(full):
    from vlm.train.checkpoint import save_checkpoint

    def save(run, step, *rest):
        if step == full:
            raise OSError(28, "No space left on device")
        return save_checkpoint(run, step, *rest)

    return save


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(config_file, straight):
    path = config_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_FAULT", "step@11=term")
        with pytest.raises(Preempted):
            run_here(path)
    run = type(path)(load_config(path).output_dir)
    (run / "checkpoints/step-000011/weights/rank-00000.safetensors").write_bytes(b"\0" * 10)
    run_here(path)
    expected, got = final_weights(straight), final_weights(run)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.slow
def test_a_run_leaves_its_config_metrics_samples_and_plot(config_file, tiny):
    image = str(tiny / "data/images/red-circle-0.png")
    run = run_here(
        config_file(
            train__max_steps=4,
            train__eval_every=2,
            train__sample_every=4,
            train__max_new_tokens=3,
            train__samples=[{"prompt": "What is this?", "image": image}, {"prompt": "Hi", "image": "gone.png"}],
        )
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 4]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "fill", "data_share"} <= lines[0].keys()
    (sample,) = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sample["prompt"] == "What is this?"
    assert (run / "loss.png").stat().st_size > 1000
    assert "output_dir" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_asking_samples_does_not_change_the_training(config_file, straight, tiny, tmp_path):
    sample = {"prompt": "What is this?", "image": str(tiny / "data/images/red-circle-0.png")}
    run = run_here(config_file(train__sample_every=3, train__samples=[sample], train__max_new_tokens=4))
    expected, got = final_weights(straight), final_weights(run)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.slow
def test_a_plain_language_model_trains_through_the_same_code(config_file, tmp_path):
    talk = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A red circle."}]}] * 8
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    path = config_file(
        model__vision=None,
        model__trainable=["llm"],
        model__lora=None,
        data__sources=[{"path": str(tmp_path / "talk.json")}],
        train__max_steps=12,
        train__learning_rate=1e-2,
    )
    losses = [loss for _, loss in steps_logged(run_here(path))]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast"])
def test_bfloat16_learns_too(config_file, precision):
    losses = [loss for _, loss in steps_logged(run_here(config_file(train__precision=precision)))]
    assert losses[-1] < losses[0] - 0.3  # float32 goes from 5.80 to 5.37


@pytest.mark.slow
def test_cached_features_train_as_the_encoder_does_and_are_made_once(config_file, straight, tmp_path):
    path = config_file(data__cache_features=True, data__cache_dtype="fp32")
    expected, got = steps_logged(straight), steps_logged(run_here(path))
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected], rel=1e-5)  # worst seen 2e-7
    (index,) = (tmp_path / "cache/encoded").rglob("*.index")
    assert index.stat().st_size == 72 * 48  # images of all records, the held-out ones too
    changes = {"data__cache_features": True, "data__cache_dtype": "fp32", "output_dir": str(tmp_path / "again")}
    run_here(config_file("again.yaml", **changes))
    assert list((tmp_path / "cache/encoded").rglob("*.index")) == [index]
    assert index.stat().st_size == 72 * 48


@pytest.mark.slow
def test_features_kept_in_bfloat16_move_the_losses_by_rounding_only(config_file, straight):
    expected = [loss for _, loss in steps_logged(straight)]
    got = [loss for _, loss in steps_logged(run_here(config_file(data__cache_features=True)))]
    assert got == pytest.approx(expected, rel=5e-4)  # worst seen 2.8e-5
    assert got != expected


@pytest.mark.slow
def test_records_that_cannot_be_used_are_listed_once_and_not_again_at_resume(config_file, tiny, tmp_path):
    lines = (tiny / "data/finetune.jsonl").read_text().splitlines()
    (tmp_path / "some_bad.jsonl").write_text("\n".join([*lines, '{"image": "gone.png", "caption": "A."}', "{"]))
    source = {"path": str(tmp_path / "some_bad.jsonl"), "images": str(tiny / "data/images")}
    for steps in (2, 4):
        run = run_here(config_file(data__sources=[source], train__max_steps=steps))
    listed = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [(skip["rule"], skip["where"]) for skip in listed] == [
        ("image_missing", "some_bad.jsonl: line 73"),
        ("bad_json", "some_bad.jsonl: line 74"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, "step@7=term"])
def test_a_last_save_that_fails_is_no_success(config_file, monkeypatch, fault):
    monkeypatch.setattr("vlm.train.resume.save_checkpoint", _disk_full_at(7 if fault else 12))
    if fault:
        monkeypatch.setenv("VLM_FAULT", fault)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        run_here(config_file(train__on_save_failure="continue"))
    assert caught.value.exit_code == 5


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_loader_processes_time_to_save(config_file):
    path = config_file(data__workers=1, train__max_steps=100_000, train__save_every=100_000)
    run = type(path)(load_config(path).output_dir)
    with started(warm.train, str(path)) as child:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(child.processes[0].pid, signal.SIGTERM)
        child.wait(120)
        assert child.codes == [143], child.output[-500:]
    assert len(list_checkpoints(run)) == 1


@pytest.mark.slow
def test_a_refused_resume_leaves_the_run_as_it_was(config_file):
    run = run_here(config_file(train__max_steps=2))
    before = (run / "config.yaml").read_text()
    with pytest.raises(CheckpointError):
        run_here(config_file(data__template="plain", train__max_steps=4))
    assert (run / "config.yaml").read_text() == before


@pytest.mark.slow
def test_a_torn_line_does_not_keep_the_plot_from_being_drawn(config_file):
    run = run_here(config_file(train__max_steps=2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (run / "loss.png").unlink()
    assert plot_loss(run).exists()


@pytest.mark.slow
def test_damaged_features_cost_their_record_once_and_are_made_again(config_file, tmp_path):
    changes = {"data__cache_features": True, "data__max_skipped_share": 1.0}
    run_here(config_file(**changes, train__max_steps=1))
    (data,) = (tmp_path / "cache/encoded").rglob("*.data")
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    (skipped,) = (run_here(config_file(**changes, output_dir=str(tmp_path / "b"))) / "skipped.jsonl").open()
    assert "no features of red-circle-1.png in data.cache" in skipped
    again = run_here(config_file(**changes, output_dir=str(tmp_path / "c")))
    assert not (again / "skipped.jsonl").exists()
    assert len(list((tmp_path / "cache/encoded").rglob("*.data"))) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.tensorboard=true", r"train\.tensorboard needs tensorboard.*\[track\]"),
        ("engine.kind=zero", r"engine\.kind zero needs deepspeed.*\[deepspeed\]"),
        ("engine.kind=pipeline", r"engine\.kind pipeline needs deepspeed"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(config_file, monkeypatch, tmp_path, option, message):
    for module in ("vlm.prepare", "vlm.train.trackers"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    config = load_config(config_file(model__llm={"path": "nowhere"}), [option])
    with pytest.raises(MissingPackageError, match=message):
        train(config, "")
    assert not (tmp_path / "run").exists()


def test_a_plan_that_fails_is_one_line_and_the_run_goes_on(config_file, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise IndexError("first line\nsecond line")

    monkeypatch.setattr("vlm.prepare.describe_plan", fail)
    run_here(config_file(train__max_steps=1))
    assert capsys.readouterr().err.count("no memory plan: IndexError: first line\n") == 1


def test_an_error_that_stops_the_run_too_is_not_said_by_the_plan(config_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"model.llm.path .*empty: cannot load its"):
        run_here(config_file(model__llm={"path": str(tmp_path / "empty")}))
    assert "no memory plan" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_a_model_put_together_from_a_checkpoint_has_what_init_from_brought_too(config_file, straight, tmp_path):
    """Samples of a pipeline, none of whose processes holds the whole model: the projector stays frozen here."""
    export_run(straight)
    changes = {"output_dir": str(tmp_path / "next"), "init_from": str(straight / "export"), "train__max_steps": 1}
    path = config_file(model__trainable=["llm.lora"], **changes)
    run = run_here(path)
    model = assemble_checkpoint(load_config(path), newest_verified(run), torch.device("cpu"))
    before = load_file(straight / "export" / "projector.safetensors")
    after = part_weights(model, "projector")
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = read_weights(newest_verified(run))
    own = part_weights(model, "llm.lora")
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.items())
