"""One training run, from a config to a checkpoint. Read top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm.artifacts.initial import load_encoder
from vlm.artifacts.pins import Pins, pin_start, places_of, refuse_replaced
from vlm.config import RunConfig
from vlm.data.build import build_conversation_tokenizer, scan_sources
from vlm.data.image_order_counts import count_image_orders
from vlm.data.skips import SkipLog
from vlm.distributed import gather_objects, is_main, main_first, on_main, process_group, rank, world_size
from vlm.errors import ConfigError, DataError, VLMError
from vlm.evaluation.during import build_measure, tasks_during
from vlm.evaluation.gate import refuse
from vlm.inference.load import LoadedModel
from vlm.inference.reward import open_judge
from vlm.launch import ignored_settings, launched_size
from vlm.logs import copied_to, log, log_level, warn
from vlm.models.build import build_encoder
from vlm.models.llm import IMAGE_TOKEN, load_tokenizer
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.lm import LanguageModelingConfig
from vlm.plan.estimate import estimate
from vlm.precision import autocast_dtype
from vlm.prepare import (
    Prepared,
    assemble_checkpoint,
    check_available,
    image_encoder,
    open_cache,
    prepare_run,
    settle_encoder,
)
from vlm.proof.checks import Proof
from vlm.proof.prove import prove, prove_run
from vlm.proof.records import choose
from vlm.schema import chosen_kinds, section_defaults
from vlm.settle import CACHE_FEATURES, FIRST_WITH_BALANCE, FIRST_WITH_SHARING, VISION_COMPUTE, settle_precision
from vlm.train.best import BestSoFar
from vlm.train.checkpoint import best_step, checkpoint_of, newest_verified, read_info, set_later_aside
from vlm.train.engines.device import choose_device
from vlm.train.engines.kinds import kind_of_launch
from vlm.train.events import FAILED, Measured, RunEvents
from vlm.train.features import fill_with_all_ranks
from vlm.train.interrupt import StopRequest
from vlm.train.loop import Every, TrainLoop
from vlm.train.metrics import Reporter, plot_loss, read_metrics
from vlm.train.optim import build_schedule
from vlm.train.profile import StepProfile
from vlm.train.reference import REFERENCE, with_reference, with_reference_of
from vlm.train.resume import OPTIMIZER_STATE, RunState, flatten, read_progress, refuse_other_run
from vlm.train.rollouts import ROLLOUTS, build_rollouts
from vlm.train.runfolder import LOG, RunFolder
from vlm.train.sampling import SampleQuestions
from vlm.train.saving import CheckpointWriter
from vlm.train.switches import torch_switches

# keys of data: that decide on rows and their order
_DATA_SETTINGS = {
    "template", "system", "sources", "held_out", "max_length", "max_images", "over_long", "packing", "pack_window",
    "max_pixels", "image_placement",
}  # fmt: skip
_LATER_DATA_SETTINGS = {"drop_last", "group_by_length"}  # the same; false in checkpoints that do not name them


def train(config: RunConfig, config_text: str, profile_steps: int = 0, resume_step: int | None = None) -> Path:
    """Train as `config` says, resuming from the newest intact checkpoint of its output_dir.

    Args:
        config: the validated config.
        config_text: the YAML that is kept in the run folder, secrets left out.
        profile_steps: steps to profile, after the first two; 0 profiles none.
        resume_step: of the checkpoint to go on from; newer ones are then set aside. None takes the newest.

    Returns:
        the run folder.

    Raises:
        VLMError: see `vlm.errors` for the exit code of each.
    """
    device = choose_device(config.engine.device)
    check_available(config, device)
    if ignored := ignored_settings():
        warn(f"the launcher was told {', '.join(ignored)}: not used, the config's keys in brackets decide")
    with (
        log_level(config.train.log_level),
        torch_switches(config.train),
        _process_group(config, device),
        RunFolder(config.output_dir) as run,
        copied_to(run.path / LOG),
        _explain_out_of_memory(config),
    ):
        checkpoint = on_main(lambda: _resumed(run.path, resume_step))
        config = settle_precision(config, device, None if checkpoint is None else read_info(checkpoint)["identity"])
        identity = run_identity(config)
        if checkpoint is not None:
            refuse_other_run(checkpoint, identity, defaults_of(config), keys_of_other_kinds(config))
        start = on_main(lambda: _pin_start(config, checkpoint))
        torch.manual_seed(config.seed + rank())  # dropout differs between ranks, as it does between rows
        parts = prepare_run(config, device, calibrate=checkpoint is None)
        skips = SkipLog(
            run.path / "skipped.jsonl" if is_main() else None,
            config.data.max_skipped_share,
            config.data.max_skipped_in_a_row,
        )
        state = _run_state(parts, run, identity, start, skips)
        if checkpoint is not None:
            parts = replace(parts, start_step=state.load(checkpoint))
            log(f"resuming after step {parts.start_step} from {checkpoint}")
        run.write_config(config_text)  # not before: a refused resume leaves the run as it was
        if parts.start_step < parts.max_steps:
            if config.objective.needs_reference:
                began = {"identity": identity, "start": start}
                parts = _with_reference(parts, run, began, checkpoint is not None)
            if config.train.prove:
                prove_run(parts, run.path)
            _rewind(run, parts, skips, checkpoint)
            done, failed_gates = _train_on(parts, run, state, skips, profile_steps)
        else:
            done, failed_gates = parts.start_step, _gates_failed_before(config, run)
            if done > parts.max_steps:
                log(f"nothing to train: the run is beyond train.max_steps {parts.max_steps} already")
        log(f"done: {done} steps in {run.path}; next: vlm export {run.path}")
        refuse(failed_gates)
        return run.path


def _with_reference(parts: Prepared, run: RunFolder, began: dict[str, Any], goes_on: bool) -> Prepared:
    """With the reference model's log-probabilities, which the run folder keeps. began: what they depend on."""
    data = with_reference(parts.data, parts.config.data, parts.engine, run.path / REFERENCE, began, goes_on)
    return replace(parts, data=data)


def _train_on(
    parts: Prepared, run: RunFolder, state: RunState, skips: SkipLog, profile_steps: int
) -> tuple[int, list[str]]:
    """All steps that are left. Returns the step that the run ended at, and which gates its last measurement failed."""
    with StopRequest() as stop_request:
        loop, events = _build_loop(parts, run, state, skips, stop_request)
        if profile_steps:
            steps = {"start_step": parts.start_step, "max_steps": parts.max_steps, "num_steps": profile_steps}
            loop.events.append(Every(1, StepProfile(run.path, parts.device, **steps)))
        try:
            done = loop.run(parts.start_step)
        finally:
            events.close()
    if is_main():
        _plot(run.path)
    return done, events.failed_gates


def _resumed(run: Path, step: int | None) -> Path | None:
    return newest_verified(run) if step is None else checkpoint_of(run, step)


def _pin_start(config: RunConfig, checkpoint: Path | None) -> Pins:
    """Sums of what the run begins with. Raises CheckpointError where the checkpoint names others."""
    start = pin_start(config.model, config.init_from)
    if checkpoint is not None:
        places = places_of(config.model, config.init_from)
        refuse_replaced(checkpoint, read_info(checkpoint).get("start"), start, places)
    return start


def prove_alone(config: RunConfig) -> Proof:
    """What `train` checks before its first step, without a run folder and without a step."""
    device = choose_device(config.engine.device)
    check_available(config, device)
    with _process_group(config, device), _explain_out_of_memory(config):
        config = settle_precision(config, device)
        torch.manual_seed(config.seed + rank())
        return prove(with_first_reference(prepare_run(config, device)))


def with_first_reference(parts: Prepared) -> Prepared:
    """With the reference of the records that the proof looks at, where the objective has one."""
    if not parts.config.objective.needs_reference:
        return parts
    computed, others = on_main(lambda: choose(parts.data))
    data = with_reference_of(parts.data, parts.config.data, parts.engine, {*computed, *others})
    return replace(parts, data=data)


def _process_group(config: RunConfig, device: torch.device) -> AbstractContextManager[None]:
    """Raises ConfigError where the engine does not fit the number of processes."""
    kind = kind_of_launch(config.engine, launched_size())
    return process_group(device, config.engine.timeout_seconds, always=kind.needs_group)


def fill_cache(config: RunConfig) -> str:
    """Encode every image of the data into `data.cache`, with all ranks of the launch. The language model is not loaded.

    Returns:
        what is there now, in words.

    Raises:
        ConfigError: the model has no encoder, or trains it.
    """
    if config.model.vision is None:
        raise ConfigError("model.vision is null: there is no encoder whose features could be cached").on_every_rank()
    if config.model.trains_vision:
        raise ConfigError(
            "model.trainable names vision: the features of an encoder that trains change with every step"
        ).on_every_rank()
    device = choose_device(config.engine.device)
    with process_group(device, config.engine.timeout_seconds):
        config = settle_precision(config, device)
        vision, spec = build_encoder(config.model, precision=config.train.precision, device=str(device))
        if config.init_from is not None:
            load_encoder(vision, config.model, config.init_from)
        settle_encoder(config, vision, device)
        encoder = image_encoder(config, vision, spec, device)
        tokenizer = load_tokenizer(config.model.llm.path, config.model.trust_remote_code)
        image_token_id = tokenizer.get_vocab()[IMAGE_TOKEN]
        conversations = build_conversation_tokenizer(config.data, tokenizer, spec, image_token_id)
        with main_first():
            scans = scan_sources(config.data, conversations, config.objective.reads)
        store = on_main(lambda: open_cache(config, encoder))
        fill_with_all_ranks(store, scans, encoder)
        return store.describe()


def _agree_to_stop(request: StopRequest) -> str | None:
    """The signal that any rank got, on every rank at once."""
    return next((name for name in gather_objects(request.signal_name) if name), None)


def run_identity(config: RunConfig) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption, as flat keys. The data has its own fingerprint."""
    model = flatten(config.model.model_dump(mode="json", exclude={"gradient_checkpointing"}), "model")
    for changeable in ("model.llm.attention", VISION_COMPUTE):
        model.pop(changeable, None)
    return {
        **model,
        **flatten(config.objective.model_dump(mode="json"), "objective"),
        FIRST_WITH_SHARING: config.data.share_images,
        FIRST_WITH_BALANCE: config.data.balance,
        "seed": config.seed,
        "init_from": config.init_from,
        "train.global_batch_size": config.train.global_batch_size,
        "train.precision": config.train.precision,
        "train.optimizer": OPTIMIZER_STATE[config.train.has_8bit_state],
    }


def defaults_of(config: RunConfig) -> dict[str, Any]:
    """What keys of the identity mean where a checkpoint of an earlier version does not name them."""
    return {
        "train.optimizer": OPTIMIZER_STATE[0],
        **flatten(section_defaults(config.model), "model"),
        **flatten(section_defaults(config.objective), "objective"),
        FIRST_WITH_SHARING: False,
        FIRST_WITH_BALANCE: False,
        "objective.kind": LanguageModelingConfig().kind,  # the only one there was
    }


def keys_of_other_kinds(config: RunConfig) -> set[str]:
    """Keys that earlier versions wrote into the identity of every run, and that a run of this kind does not read."""
    return {
        ".".join((*map(str, key), name))
        for key, union, section in chosen_kinds(config)
        for name in union.foreign_fields(type(section))
    }


def _run_state(parts: Prepared, run: RunFolder, identity: dict[str, Any], start: Pins, skips: SkipLog) -> RunState:
    """What a checkpoint of this run holds beside weights and optimizer."""
    vision, data = parts.built.model.vision, parts.data.train
    if vision is not None and vision.compute is not None:
        identity[VISION_COMPUTE] = vision.compute.name
    identity[CACHE_FEATURES] = parts.config.data.cache_features
    chosen = {key for key in _LATER_DATA_SETTINGS if getattr(parts.config.data, key)}
    settings = flatten(parts.config.data.model_dump(mode="json", include=_DATA_SETTINGS | chosen), "data")
    orders = count_image_orders(data.order.scan.reader, data.order.with_images) if is_main() else {}
    return RunState(
        run.path,
        parts.engine,
        data.fingerprint,
        identity,
        settings,
        start,
        skips.state,
        orders,
        earlier_fingerprint=lambda: data.earlier_fingerprint,
    )


def _rewind(run: RunFolder, parts: Prepared, skips: SkipLog, checkpoint: Path | None) -> None:
    """Drop what was written after the checkpoint that this launch goes on from; set newer checkpoints aside."""
    for name in ("metrics.jsonl", "samples.jsonl", "skipped.jsonl", ROLLOUTS):
        run.rewind(name, parts.start_step or -1)  # -1: all of a run that was killed before its first checkpoint
    if parts.start_step == 0:
        skips.list_found([skip for scan in parts.data.scans for skip in scan.skips])
    if checkpoint is not None:
        skips.restore(read_progress(checkpoint))
        for path in on_main(lambda: set_later_aside(run.path, checkpoint)):
            log(f"{path.name}: set aside, as the run goes on from {checkpoint.name}; it may be removed")


def _build_loop(
    parts: Prepared, run: RunFolder, state: RunState, skips: SkipLog, stop_request: StopRequest
) -> tuple[TrainLoop, RunEvents]:
    config, data, settings = parts.config, parts.data, parts.config.train
    schedule = build_schedule(settings, parts.max_steps)
    steps = {"start_step": parts.start_step, "max_steps": parts.max_steps}
    dtype = autocast_dtype(settings.precision)
    events = RunEvents(
        settings=settings,
        run=run,
        state=state,
        writer=CheckpointWriter(state, settings),
        reporter=Reporter(run, settings, schedule, data.train.epoch_at, **steps),
        skips=skips,
        questions=SampleQuestions(
            data.conversation_tokenizer, parts.built.image_spec, parts.device, dtype, settings.max_new_tokens
        ),
        assemble=lambda checkpoint: assemble_checkpoint(config, checkpoint, parts.device),
        held_out=data.held_out,
        counted=config.objective.counted,
        measure=_build_measure(parts) if settings.eval_tasks else None,
        best=_best_so_far(parts, run),
        failed_gates=_gates_failed_before(config, run),
    )
    loop = TrainLoop(
        engine=parts.engine,
        objective=parts.objective,
        stream=data.train,
        schedule=schedule,
        max_steps=parts.max_steps,
        report=events.report,
        save=events.save,
        stop_requested=lambda: _agree_to_stop(stop_request),
        events=events.periodic(),
        save_every=settings.save_every,
        max_bad_steps=settings.max_bad_steps,
        is_over=events.is_over,
        thaw={str(part): step for part, step in settings.thaw.items()},
        updates=config.objective.updates_per_step,
        roll=build_rollouts(
            config,
            data,
            parts.engine,
            parts.start,
            lambda line: run.append(ROLLOUTS, line),
            lambda path: open_judge(
                path, data.conversation_tokenizer, parts.device, config.data.max_length, config.data.max_pixels
            ),
        ),
    )
    return loop, events


def _build_measure(parts: Prepared) -> Callable[[VisionLanguageModel], Measured]:
    """Of `train.eval_tasks`."""
    config, built = parts.config, parts.built
    tokenizer = parts.data.conversation_tokenizer

    def loaded_of(model: VisionLanguageModel) -> LoadedModel:
        return LoadedModel(
            model=model,
            tokenizer=built.tokenizer,
            conversation_tokenizer=tokenizer,
            image_spec=built.image_spec,
            image_token_id=built.image_token_id,
            config=config.model,
            system=config.data.system,
            device=parts.device,
            compute_dtype=autocast_dtype(config.train.precision) or torch.float32,
        )

    tasks = tasks_during(config.evaluation, config.train.eval_tasks, config.train.eval_records)
    return build_measure(tasks, Path(config.data.cache), tokenizer, loaded_of)


def _best_so_far(parts: Prepared, run: RunFolder) -> BestSoFar | None:
    """What of `train.keep_best` was measured before, where a run is resumed. Raises ConfigError if it never will be."""
    name = parts.config.train.keep_best
    if name is None:
        return None
    if name.startswith("held_out_") and parts.data.held_out is None:
        raise ConfigError(
            f"train.keep_best is {name}, but nothing is held out: set data.held_out or data.eval_sources"
        ).on_every_rank()
    tasks = {task.name: task for task in parts.config.evaluation.tasks}
    task = tasks.get(name) or tasks.get(name.rpartition(".")[0])
    best = BestSoFar(name, lower_is_better=name == "held_out_loss" if task is None else task.lower_is_better)
    best.add_lines(on_main(lambda: _lines_before(run)))
    if best.step is not None and on_main(lambda: best_step(run.path)) != best.step:
        warn(f"the checkpoint of step {best.step}, the best by {name}, is gone: what is measured now counts anew")
        return BestSoFar(name, best.lower_is_better)
    return best


def _gates_failed_before(config: RunConfig, run: RunFolder) -> list[str]:
    """What the last measurement of an earlier launch did not pass. Nothing where the config has no gates any more."""
    names = config.train.eval_tasks
    if not any(task.gate is not None for task in config.evaluation.tasks if task.name in names):
        return []
    return on_main(lambda: next((line[FAILED] for line in reversed(_lines_before(run)) if FAILED in line), []))


def _lines_before(run: RunFolder) -> list[dict[str, Any]]:
    metrics = run.path / "metrics.jsonl"
    return [*read_metrics(metrics)] if metrics.is_file() else []


def _plot(run: Path) -> None:
    """loss.png; a run that is done does not fail because it cannot be drawn."""
    try:
        plot_loss(run)
    except (DataError, OSError) as error:
        warn(f"loss.png was not drawn: {error}")


@contextmanager
def _explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        rows, length = config.train.micro_batch_size, config.data.max_length
        checkpointing = config.model.gradient_checkpointing
        try:
            needed = f"{estimate(config, world_size()).activation_gib:.1f} GiB"
        except VLMError:  # a model of another form; the advice holds without a number
            needed = "an unknown amount"
        raise VLMError(
            f"out of memory with {rows} x {length} tokens per forward, whose activations take about {needed} "
            f"beside the weights ({error}). Change one of: train.micro_batch_size (now {rows}), "
            f"model.gradient_checkpointing (now {str(checkpointing).lower()}), data.max_length (now {length}; "
            "this one needs another output_dir)"
        ) from None
