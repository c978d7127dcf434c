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
from vlm.errors import ConfigError, DataError, VLMError
from vlm.export.load import load_init
from vlm.logs import log, warn
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
    with RunFolder(config.output_dir) as run, _explain_out_of_memory(config):
        checkpoint = newest_verified(run.path)
        if checkpoint is not None:
            refuse_other_run(checkpoint, identity)
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
        run.write_config(config_text)  # not before: a refused resume leaves the run as it was
        if start_step < max_steps:
            with StopRequest() as stop_request:
                loop, events = _build_loop(config, run, state, built, data, device, start_step, max_steps)
                loop.stop_requested = lambda: stop_request.signal_name
                try:
                    loop.run(start_step)
                finally:
                    events.reporter.close()
            _plot(run.path)
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
    model = flatten(config.model.model_dump(mode="json", exclude={"gradient_checkpointing"}), "model")
    model.pop("model.llm.attention", None)
    return {
        **model,
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
) -> tuple[TrainLoop, RunEvents]:  # fmt: skip
    settings = config.train
    schedule = build_schedule(settings, max_steps)
    for name in ("metrics.jsonl", "samples.jsonl"):
        run.rewind(name, start_step)
    dtype = autocast_dtype(settings.precision)
    skips = SkipLog(run.path / "skipped.jsonl", config.data.max_skipped_share, config.data.max_skipped_in_a_row)
    if start_step == 0:
        (run.path / "skipped.jsonl").unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        skips.list_found([skip for scan in data.scans for skip in scan.skips])
    events = RunEvents(
        settings=settings,
        run=run,
        state=state,
        reporter=Reporter(run, settings, schedule, data.train.epoch_at, start_step=start_step, max_steps=max_steps),
        skips=skips,
        sampler=Sampler(
            built.model, data.conversation_tokenizer, built.image_spec, device, dtype, settings.max_new_tokens
        ),
        held_out=data.held_out,
    )
    loop = TrainLoop(
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
    return loop, events


def _calibrate_projector(config: RunConfig, built: Assembled, data: Data, device: torch.device) -> None:
    """Set the projector's channel statistics from the first training pictures, unless init_from brought them."""
    vision, projector = built.model.vision, built.model.projector
    if vision is None or projector is None or not projector.normalize or projector.feature_mean.any():
        return
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


def _plot(run: Path) -> None:
    """loss.png; a run that is done does not fail for want of a picture."""
    try:
        plot_loss(run)
    except (DataError, OSError) as error:
        warn(f"loss.png was not drawn: {error}")


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
        checkpointing = config.model.gradient_checkpointing
        try:
            estimate = f"{activation_gib(config.model.llm.path, rows * length, checkpointing):.1f} GiB"
        except (OSError, ValueError, AttributeError):  # a config of another form; the advice holds without a number
            estimate = "an unknown amount"
        raise VLMError(
            f"out of memory with {rows} x {length} tokens per forward, whose activations take about {estimate} "
            f"beside the weights ({error}). Change one of: train.micro_batch_size (now {rows}), "
            f"model.gradient_checkpointing (now {str(checkpointing).lower()}), data.max_length (now {length}; "
            "this one needs another output_dir)"
        ) from None


def activation_gib(llm_path: str, num_tokens: int, checkpointing: bool) -> float:
    """Memory of a language model's activations for one forward with gradients, in GiB.

    34 bytes per token, block and unit of width in 16 bit, attention's own matrices left out as fused kernels do
    (Korthikanti et al. 2022, arXiv:2205.05198, equation 2); with checkpointing, 2 bytes each and one block in full.
    """
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(llm_path)
    per_block = num_tokens * settings.hidden_size
    blocks = settings.num_hidden_layers
    return per_block * (2 * blocks + 34 if checkpointing else 34 * blocks) / 2**30
