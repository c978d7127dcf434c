"""One training run, from a config to a checkpoint. Read top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlm.config import RunConfig
from vlm.data.build import Data, build_data
from vlm.data.skips import SkipLog
from vlm.errors import ConfigError, VLMError
from vlm.export.load import load_init
from vlm.logs import log
from vlm.models.build import Assembled, build_model
from vlm.objectives.lm import LanguageModeling
from vlm.train.checkpoint import newest_verified
from vlm.train.engines.local import LocalEngine
from vlm.train.events import RunEvents
from vlm.train.features import fill_store, open_store
from vlm.train.interrupt import StopRequest
from vlm.train.loop import TrainLoop
from vlm.train.metrics import Reporter, plot_loss
from vlm.train.optim import build_optimizer, build_schedule, describe_groups
from vlm.train.resume import RunState, flatten, refuse_other_run
from vlm.train.runfolder import RunFolder
from vlm.train.sampling import Sampler

CALIBRATION_STEPS = 8  # optimizer steps whose pictures set the projector's channel statistics


def train(config: RunConfig, config_text: str) -> Path:
    """Train as `config` says, resuming from the newest intact checkpoint of its output_dir.

    Args:
        config: the validated config.
        config_text: the YAML that is kept in the run folder, secrets left out.

    Returns:
        the run folder.

    Raises:
        VLMError: see `vlm.errors` for the exit code of each.
    """
    device = choose_device(config.engine.device)
    identity = run_identity(config)
    with RunFolder(config.output_dir) as run, StopRequest() as stop_request, _explain_out_of_memory(config):
        checkpoint = newest_verified(run.path)
        if checkpoint is not None:
            refuse_other_run(checkpoint, identity)
        run.write_config(config_text)
        torch.manual_seed(config.seed)
        built = build_model(config.model, precision=config.train.precision, device=str(device), seed=config.seed)
        if config.init_from is not None:
            for line in load_init(built.model, Path(config.init_from)):
                log(f"init_from: {line}")
        data = _build_data(config, built, device)
        engine = _build_engine(config, built, device)
        max_steps = config.train.max_steps or data.train.steps_in(config.train.epochs or 1)
        _describe(config, built, data, engine, max_steps)
        state = RunState(run.path, engine, data.train.fingerprint, identity)
        if checkpoint is not None:
            start_step = state.load(checkpoint)
            log(f"resuming after step {start_step} from {checkpoint}")
        else:
            start_step = 0
            _calibrate_projector(config, built, data, device)
        if start_step < max_steps:
            loop = _build_loop(config, run, state, built, data, device, start_step, max_steps)
            loop.stop_requested = lambda: stop_request.signal_name
            loop.run(start_step)
            plot_loss(run.path)
        log(f"done: {max_steps} steps in {run.path}; next: vlm export {run.path}")
        return run.path


def choose_device(name: str) -> torch.device:
    """auto: the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device is cuda, but torch sees no GPU here. Set engine.device to auto or cpu, "
            "or install a CUDA build of torch; `vlm doctor` shows what is installed"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def run_identity(config: RunConfig) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption, as flat keys. The data has its own fingerprint."""
    return {
        **flatten(config.model.model_dump(mode="json"), "model"),
        "seed": config.seed,
        "init_from": config.init_from,
        "train.global_batch_size": config.train.global_batch_size,
        "train.precision": config.train.precision,
    }


def autocast_dtype(precision: str) -> torch.dtype | None:
    return None if precision == "fp32" else torch.bfloat16


def _build_data(config: RunConfig, built: Assembled, device: torch.device) -> Data:
    """The streams; with `data.cache_features`, every picture is encoded first."""
    vision, spec, dtype = built.model.vision, built.image_spec, autocast_dtype(config.train.precision)
    store = None
    if config.data.cache_features and vision is not None and spec is not None:
        if not vision.is_frozen:
            raise ConfigError("data.cache_features needs a frozen encoder, but model.trainable names vision; drop one")
        store = open_store(config.data.cache, vision, spec, dtype)
    data = build_data(
        config.data,
        built.tokenizer,
        spec,
        built.image_token_id,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        features=store,
    )
    if store is not None and vision is not None and spec is not None:
        fill_store(
            store,
            data.scans,
            vision,
            spec,
            max_pixels=config.data.max_pixels,
            device=device,
            autocast_dtype=dtype,
        )
    return data


def _build_engine(config: RunConfig, built: Assembled, device: torch.device) -> LocalEngine:
    return LocalEngine(
        built.model,
        LanguageModeling(),
        build_optimizer(built.model, config.train),
        device=device,
        autocast_dtype=autocast_dtype(config.train.precision),
        max_grad_norm=config.train.max_grad_norm,
    )


def _build_loop(
    config: RunConfig, run: RunFolder, state: RunState, built: Assembled, data: Data, device: torch.device,
    start_step: int, max_steps: int,
) -> TrainLoop:  # fmt: skip
    settings = config.train
    schedule = build_schedule(settings, max_steps)
    for name in ("metrics.jsonl", "samples.jsonl"):
        run.rewind(name, start_step)
    dtype = autocast_dtype(settings.precision)
    events = RunEvents(
        settings=settings,
        run=run,
        state=state,
        reporter=Reporter(run, settings, schedule, data.train.epoch_at, start_step=start_step, max_steps=max_steps),
        skips=SkipLog(run.path / "skipped.jsonl", config.data.max_skipped_share, config.data.max_skipped_in_a_row),
        sampler=Sampler(
            built.model, data.conversation_tokenizer, built.image_spec, device, dtype, settings.max_new_tokens
        ),
        held_out=data.held_out,
    )
    return TrainLoop(
        engine=state.engine,
        objective=LanguageModeling(),
        stream=data.train,
        learning_rate=schedule,
        max_steps=max_steps,
        report=events.report,
        save=events.save,
        events=events.periodic(),
        save_every=settings.save_every,
        max_bad_steps=settings.max_bad_steps,
    )


def _calibrate_projector(config: RunConfig, built: Assembled, data: Data, device: torch.device) -> None:
    """Set the projector's channel statistics from the first training pictures, unless init_from brought them."""
    if not config.model.projector.normalize or config.model.vision is None or config.init_from is not None:
        return
    vision, projector = built.model.vision, built.model.projector
    assert vision is not None
    assert projector is not None
    found = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision != "fp32"):
        for _, batches in zip(range(CALIBRATION_STEPS), data.train.iterate(0), strict=False):
            for batch in (batch.to(device) for batch in batches if batch.num_images):
                cached = batch.image_features
                found.append(vision(batch.pixel_values) if cached is None else cached)
    if not found:
        raise ConfigError(
            "model.projector.normalize needs pictures to take statistics from, and the first "
            f"{CALIBRATION_STEPS} steps have none. Set it to false, or check data.sources"
        )
    features = torch.cat(found)
    projector.calibrate(features)
    log(f"projector: channel statistics from {len(features)} pictures")


def _describe(config: RunConfig, built: Assembled, data: Data, engine: LocalEngine, max_steps: int) -> None:
    """The lines before the first step."""
    parameters = list(built.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    log(f"model: {sum(p.numel() for p in parameters):,} parameters, {trained:,} trained, on {engine.device.type}")
    log(f"trained: {describe_groups(engine.optimizer)}")
    log(
        f"data: {data.num_records:,} records, {len(data.skips)} skipped, rows of {config.data.max_length} tokens "
        f"{data.train.fill:.0%} full"
    )
    log(f"steps: {max_steps} ({data.train.epoch_at(max_steps):.2f} epochs), {config.train.global_batch_size} rows each")


@contextmanager
def _explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        rows, length = config.train.micro_batch_size, config.data.max_length
        raise VLMError(
            f"out of memory with {rows} x {length} tokens per forward ({error}). Change one of: "
            f"train.micro_batch_size (now {rows}), data.max_length (now {length}), "
            f"model.gradient_checkpointing (now {str(config.model.gradient_checkpointing).lower()})"
        ) from None
