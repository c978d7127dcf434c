"""Config -> all that a run needs before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch import Tensor

from vlm import precision
from vlm.artifacts.initial import load_init
from vlm.artifacts.llava import read_start
from vlm.batch import Batch, ImageSpec
from vlm.config import RunConfig, unused_settings
from vlm.config_checks import blind_reference
from vlm.data.balance import RowWork
from vlm.data.build import Data, build_data
from vlm.data.features import FeatureStore
from vlm.distributed import gather_objects, is_main, main_first, on_main, together, world_size
from vlm.errors import ConfigError, DataError, MissingPackageError, VLMError
from vlm.launch import launched_rank, launched_size
from vlm.logs import Progress, log, warn
from vlm.models.build import Assembled, build_model, forked_random_state
from vlm.models.entry import embedding_scale
from vlm.models.families import describe_packing, has_llm_parts
from vlm.models.pipeline_build import Stage, build_stage
from vlm.models.quantize import unpacked_shape
from vlm.models.trainable import load_weights
from vlm.models.vision import VisionEncoder
from vlm.models.vlm import VisionLanguageModel, evaluating
from vlm.objectives.base import Objective
from vlm.plan.cost import row_work
from vlm.plan.estimate import estimate
from vlm.plan.memory import device_memory
from vlm.plan.report import describe_plan
from vlm.plan.shapes import read_shapes
from vlm.settle import settle_precision
from vlm.train.bitsandbytes_adamw import check_installed
from vlm.train.cache_choice import choose_by_measuring
from vlm.train.engines.base import Engine
from vlm.train.engines.kind import EngineInputs, EngineKind, Place
from vlm.train.engines.kinds import kind_of_launch
from vlm.train.features import ImageEncoder, fill_with_all_ranks, open_store
from vlm.train.fragments import read_weights
from vlm.train.initialize import CANDIDATES, fit_least_squares
from vlm.train.optim import describe_sizes
from vlm.train.rollouts import Start
from vlm.train.scaling import loss_scale_for
from vlm.train.trackers import check_trackers

CALIBRATION_STEPS = 8  # optimizer steps whose images set the projector's channel statistics


@dataclass(frozen=True)
class Prepared:
    """A run that has not begun: all that it is made of."""

    config: RunConfig  # with the precision that was chosen
    device: torch.device
    built: Assembled
    data: Data
    engine: Engine
    objective: Objective
    max_steps: int
    start: Start | None = None  # what trains, as it is before the first step, where the objective compares with it
    start_step: int = 0  # past 0 the weights are a checkpoint's


def check_available(config: RunConfig, device: torch.device) -> None:
    """Whether this machine has what the config asks for, before anything is loaded.

    Raises:
        MissingPackageError: an optional package is not installed.
        ConfigError: float16 without a GPU.
    """
    check_installed(config.train)
    if config.train.precision != "auto":
        precision.resolve(config.train.precision, device, "train.precision")
    check_trackers(config.train)
    package = config.engine.package
    if package is not None and find_spec(package) is None:
        raise MissingPackageError(package, f"engine.kind {config.engine.kind}", package)


def prepare_run(config: RunConfig, device: torch.device, *, calibrate: bool = True) -> Prepared:
    """Build model, data and engine. Every rank of the launch calls this, inside its process group.

    Args:
        calibrate: set the projector's statistics from data; a checkpoint brings its own.
    """
    if config.train.precision == "auto":  # a caller with a checkpoint has settled it before
        config = settle_precision(config, device)
    kind = kind_of_launch(config.engine, launched_size())
    place = kind.place(launched_rank(), launched_size())
    for line in (*unused_settings(config), *blind_reference(config)):
        warn(line)
    no_plan = _tell_plan(config, place) if is_main() else ""
    stage = _build_stage(config, kind, place, device)
    built = _build_whole(config, device) if stage is None else stage.built
    settle_encoder(config, built.model.vision, device)
    if no_plan:  # what else stopped the plan has stopped the model too, and was said there
        log(f"no memory plan: {no_plan}")
    data = _build_data(config, built, place)
    max_steps = config.train.max_steps or data.train.steps_in(config.train.epochs or 1)
    config, data = _with_cached_features(config, built, data, device, place, max_steps)
    if calibrate:
        _calibrate_projector(config, built, data, device)
        _initialize_projector(config, built, data, device)
    if stage is None:
        shapes = {name: unpacked_shape(parameter) for name, parameter in built.model.named_parameters()}
        trained = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    else:
        shapes, trained = dict(stage.shapes), set(stage.trained)
    log(f"model: {describe_sizes(shapes, trained, config.train)}, on {device.type}")
    if built.model.vision is not None and built.model.vision.compute is not None:
        log(f"vision encoder: computes in {built.model.vision.compute.name}")
    stages = f", {place.num_stages} stages" if place.num_stages > 1 else ""
    log(f"engine: {kind.describe()}, {place.num_processes} processes{stages}")
    _describe_packing(config, built.model, kind, place)
    _refuse_different_data(data, max_steps)
    _describe_data(config, data, max_steps)
    objective = config.objective.build()
    inputs = EngineInputs(
        config.train,
        stage if stage is not None and kind.has_stages else built.model,
        objective,
        place,
        device,
        autocast_dtype=precision.autocast_dtype(config.train.precision),
        accumulation_steps=data.train.microbatches_per_step,
        loss_scale=loss_scale_for(config.train.precision),
    )
    engine = kind.build(inputs)
    start = Start(engine) if config.objective.keeps_start else None
    return Prepared(config, device, built, data, engine, objective, max_steps, start)


def _refuse_different_data(data: Data, max_steps: int) -> None:
    """Each rank has scanned the data by itself, and would train on rows of its own. Raises DataError on all."""
    found = gather_objects((data.train.fingerprint, max_steps))
    if len(set(found)) > 1:
        error = DataError(
            "the ranks see different data:\n"
            + "\n".join(f"  rank {number}: {steps} steps, {digest}" for number, (digest, steps) in enumerate(found))
            + "\nUsually a machine lacks some images or data files, or has another version of them: compare "
            "`vlm data check` on each"
        )
        error.everywhere = True
        raise error


def _describe_packing(config: RunConfig, model: VisionLanguageModel, engine: EngineKind, place: Place) -> None:
    """Say that packing is slower with this decoder, if it is.

    Raises:
        ConfigError: the engine cannot decode records one by one, or by the length of the longest, as this model needs.
    """
    longest, line = model.packing.longest, describe_packing(model.llm.config)
    kind = model.llm.config.model_type
    is_spread = engine.gathers and place.num_data_ranks > 1
    if line is not None and is_spread:  # seen to hang: ranks with other records gather blocks another number of times
        raise ConfigError(
            f"engine.kind {engine.kind}: model type {kind} is decoded record by record, and ranks that gather a "
            "model's parts would wait for each other. Set engine.kind to ddp, or to zero with stage 2"
        )
    if line is not None and config.data.packing:
        log(line)
    depends = longest is not None and config.data.max_length > longest
    if depends and (is_spread or (engine.has_stages and config.data.packing)):
        raise ConfigError(
            f"data.max_length {config.data.max_length}: beyond {longest} tokens the rotary embedding of {kind} depends "
            f"on the longest record of a row, which engine.kind {engine.kind} does not keep apart. Set data.max_length "
            f"to {longest}, or engine.kind to ddp or to zero with stage 2"
        )


def _tell_plan(config: RunConfig, place: Place) -> str:
    """What each device will hold, before anything is loaded. An estimate: it warns, and neither refuses nor fails.

    Returns:
        one line that says why there is none, else "".
    """
    try:
        memory, _ = device_memory(config.engine.device, place.num_processes)
        for line in describe_plan(config, place.num_processes, memory):
            (warn if line.startswith("DOES NOT FIT") else log)(line)
    except Exception as error:  # whatever it is, the run goes on, and ends by itself where it matters
        reason = str(error).partition("\n")[0]
        return reason if isinstance(error, VLMError) else f"{type(error).__name__}: {reason}"
    return ""


def _build_whole(config: RunConfig, device: torch.device) -> Assembled:
    built = _build_model(config, device)
    if config.init_from is not None:
        for line in load_init(built.model, config.model, config.init_from):
            log(f"init_from: {line}")
    return built


def _build_model(config: RunConfig, device: torch.device) -> Assembled:
    return build_model(
        config.model, precision=config.train.precision, device=str(device), seed=config.seed,
        scores=config.objective.scores,
    )  # fmt: skip


def _build_stage(config: RunConfig, kind: EngineKind, place: Place, device: torch.device) -> Stage | None:
    """This rank's part of the model, without the others' in memory: a pipeline's stage, or pieces of all blocks.

    None where a rank holds the whole model: most engines, decoders whose parts are not known, and packed weights, which
    are packed whole.
    """
    is_packed = config.model.llm.quantization is not None
    spread = None if is_packed else kind.block_spreader(config.train, place, device)
    cuts: tuple[int, ...] = ()
    if kind.has_stages:
        cuts = estimate(config, place.num_processes).cuts
    elif spread is None or not has_llm_parts(config.model.llm.path):
        return None

    def build() -> Stage:
        return build_stage(
            config.model, cuts, place.stage,
            precision=config.train.precision, device=str(device), seed=config.seed, spread=spread,
            scores=config.objective.scores,
        )  # fmt: skip

    # an error while blocks are spread cannot be agreed on: the others wait in DeepSpeed's collectives
    stage = together(build) if spread is None else build()
    if config.init_from is not None:
        for line in load_init(stage, config.model, config.init_from):
            log(f"init_from: {line}")
    return stage


def assemble_checkpoint(config: RunConfig, checkpoint: Path, device: torch.device) -> VisionLanguageModel | None:
    """The whole model with a checkpoint's weights, beside what the process holds already. None if it does not fit.

    torch's random state is left as it was.
    """
    needed = 1.1 * sum(device.parameters for device in estimate(config, world_size()).devices)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        return None
    with forked_random_state():
        model = _build_model(config, device).model
        if config.init_from is not None:  # what of it does not train is not in the checkpoint
            load_init(model, config.model, config.init_from)
        if model.vision is not None and config.model.vision is not None and model.vision.is_frozen:
            dtype = precision.autocast_dtype(config.train.precision) or torch.float32
            model.vision.settle(model.vision.choose(config.model.vision, dtype, device))
        load_weights(model, read_weights(checkpoint), str(checkpoint))
    return model


def _build_data(config: RunConfig, built: Assembled, place: Place) -> Data:
    """The streams. Rank 0 fills the caches of lengths and indexes on disk."""
    settings = config.data
    if config.objective.writes_replies:  # a row is a prompt; what is written to it makes rows of its own
        settings = settings.model_copy(update={"packing": False})
    with main_first():
        return build_data(
            settings,
            built.tokenizer,
            built.image_spec,
            built.image_token_id,
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=place.data_rank,
            num_data_ranks=place.num_data_ranks,
            reads_images=place.stage == 0,
            may_share=built.model.lets_records_share,
            work=_row_work(config, place),
            reads=config.objective.reads,
        )


def _row_work(config: RunConfig, place: Place) -> RowWork | None:
    """What ranks share a step's rows out by, alike on all of them. None: in their order, as with one data rank."""
    if not config.data.balance or place.num_data_ranks == 1:
        return None
    try:
        return row_work(config, read_shapes(config.model))
    except VLMError as error:  # of what has no estimate: the model itself is built from other files
        log(f"data: rows are not shared out by work: {str(error).partition(chr(10))[0]}")
        return None


def _with_cached_features(
    config: RunConfig, built: Assembled, data: Data, device: torch.device, place: Place, max_steps: int
) -> tuple[RunConfig, Data]:
    """Encode every image first, if the config says so or it saves time. The config then says which."""
    wanted, vision, spec = config.data.cache_features, built.model.vision, built.image_spec
    if not wanted or spec is None:
        return config, data
    if config.model.trains_vision:  # only auto gets here
        return _settle_cache(config, False, "model.trainable names vision"), data
    own = None if vision is None else image_encoder(config, vision, spec, device)  # None on later stages of a pipeline
    store = on_main(lambda: open_cache(config, own))
    if wanted == "auto":
        config = _settle_cache(config, *on_main(lambda: _choose_cache(config, store, own, data, place, max_steps)))
    if not config.data.cache_features:
        return config, data
    fill_with_all_ranks(store, data.scans, own)
    return config, data.with_features(store)


def _settle_cache(config: RunConfig, cached: bool, why: str) -> RunConfig:
    log(f"data.cache_features: {str(cached).lower()}, as {why}")
    return config.model_copy(update={"data": config.data.model_copy(update={"cache_features": cached})})


def image_encoder(config: RunConfig, vision: VisionEncoder, spec: ImageSpec, device: torch.device) -> ImageEncoder:
    dtype = precision.autocast_dtype(config.train.precision)
    data = config.data
    return ImageEncoder(vision, spec, data.max_pixels, device, dtype, data.workers, data.jpeg_draft)


def open_cache(config: RunConfig, encoder: ImageEncoder | None) -> FeatureStore:
    """The store of this encoder's features. Rank 0 has the encoder under every engine."""
    assert encoder is not None
    settings = config.data
    kept = precision.DTYPES[settings.cache_dtype]
    return open_store(settings.cache, encoder, kept, settings.cache_size_gb)


def _choose_cache(
    config: RunConfig, store: FeatureStore, encoder: ImageEncoder | None, data: Data, place: Place, max_steps: int
) -> tuple[bool, str]:
    assert encoder is not None
    order, settings = data.train.order, config.train
    of_epoch = int(order.scan.num_images[order.order(0)].sum())
    epochs = max_steps / data.train.steps_in_epoch(0)
    if config.model.projector.initialize == "least_squares" and not _brings_projector(config):
        epochs += 1
    evaluations = max_steps // settings.eval_every if settings.eval_every else 0
    held_out = 0
    if data.held_out is not None:
        held_out = sum(int(data.held_out.scan.num_images[row].sum()) for row in data.held_out.rows)
    return choose_by_measuring(
        store,
        data.scans,
        encoder,
        looks=epochs * of_epoch + evaluations * held_out,
        num_ranks=place.num_data_ranks,
        decodes_beside=config.data.workers > 0,
    )


def settle_encoder(config: RunConfig, vision: VisionEncoder | None, device: torch.device) -> None:
    """How a frozen encoder computes. Rank 0, which has it under every engine, chooses for all machines.

    Args:
        vision: None on later stages of a pipeline.
    """
    wanted = config.model.vision
    if wanted is None or config.model.trains_vision:
        return
    dtype = precision.autocast_dtype(config.train.precision) or torch.float32
    chosen = on_main(lambda: None if vision is None else vision.choose(wanted, dtype, device))
    if vision is not None:
        vision.settle(chosen)


def _calibrate_projector(config: RunConfig, built: Assembled, data: Data, device: torch.device) -> None:
    """Set the projector's channel statistics from the first training images, unless init_from brought them.

    Rank 0 takes them from the rows of all ranks, so that they do not depend on how many there are.
    """
    if config.model.vision is None or not config.model.projector.normalize:
        return
    projector = built.model.projector  # None on later stages of a pipeline

    def measure() -> dict[str, Tensor]:
        """Name -> statistics [...] of the projector, on the CPU."""
        assert projector is not None
        if not projector.feature_mean.any():
            features = _first_features(config, built, data, device)
            projector.calibrate(features)
            log(f"projector: channel statistics from {len(features)} images")
        return {name: buffer.cpu() for name, buffer in projector.named_buffers()}

    statistics = on_main(measure)
    if projector is not None:
        with torch.no_grad():
            for name, values in statistics.items():
                projector.get_buffer(name).copy_(values)


def _initialize_projector(config: RunConfig, built: Assembled, data: Data, device: torch.device) -> None:
    """Fit the projector's last layer to the first epoch's images, if the config asks and init_from brought none."""
    if config.model.vision is None or config.model.projector.initialize != "least_squares" or _brings_projector(config):
        return
    projector = built.model.projector  # None on later stages of a pipeline

    def fit() -> dict[str, Tensor]:
        """Name -> weights [...] of the projector, on the CPU."""
        assert projector is not None
        assert built.image_token_id is not None
        llm = built.model.llm
        num_steps = data.train.steps_in(1)
        with Progress("projector: least squares,", num_steps, "steps") as progress:
            batches = _with_features(config, built, data, device, num_steps, progress.show)
            found = fit_least_squares(
                projector, llm.get_input_embeddings().weight, built.image_token_id, batches, embedding_scale(llm)
            )
        log(
            f"projector: least squares over {found.num_images:,} images (ridge {found.ridge:g}); of "
            f"{found.num_held_out} held out: variance explained {found.explained:.2f}, own words the nearest of "
            f"{CANDIDATES} {found.found:.2f}"
        )
        return {name: parameter.detach().cpu() for name, parameter in projector.named_parameters()}

    parameters = on_main(fit)
    if projector is not None:
        with torch.no_grad():
            for name, values in parameters.items():
                projector.get_parameter(name).copy_(values)


def _brings_projector(config: RunConfig) -> bool:
    return config.init_from is not None and "projector" in read_start(Path(config.init_from)).included


def _first_features(config: RunConfig, built: Assembled, data: Data, device: torch.device) -> Tensor:
    """[N, P, C] of the images in the first steps."""
    found = [features for _, features in _with_features(config, built, data, device, CALIBRATION_STEPS)]
    if not found:
        raise ConfigError(
            "model.projector.normalize needs images to take statistics from, and the first "
            f"{CALIBRATION_STEPS} steps have none. Set it to false, or check data.sources"
        )
    return torch.cat(found)


def _with_features(
    config: RunConfig,
    built: Assembled,
    data: Data,
    device: torch.device,
    num_steps: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Iterator[tuple[Batch, Tensor]]:
    """The batches of all ranks in the first steps that have images, with the encoder's features [N, P, C] of these.

    A trained encoder is asked in evaluation mode: looking at it moves no statistics, and rank 0 alone does.
    """
    vision = built.model.vision
    assert vision is not None
    dtype = precision.autocast_dtype(config.train.precision)
    for step, batches in zip(range(num_steps), data.train.for_rank(0, 1).iterate(0), strict=False):
        on_step(step)
        for batch in (batch.to(device) for batch in batches if batch.num_images):
            with torch.no_grad(), precision.autocast(device.type, dtype), evaluating(vision):
                features = vision(batch.pixel_values) if batch.image_features is None else batch.image_features
            yield batch, features


def _describe_data(config: RunConfig, data: Data, max_steps: int) -> None:
    is_asked = config.objective.writes_replies
    filled = "a prompt each" if is_asked else f"of {config.data.max_length} tokens {data.train.fill:.0%} full"
    log(f"data: {data.num_records:,} records, {len(data.skips)} skipped, rows {filled}")
    records, tokens = data.train.order.num_shared(0)
    if records:
        paired = config.objective.reads == "preference"
        what = "have both replies after one question" if paired else "share the image of another one"
        log(f"data: {records:,} records {what}: {tokens:,} tokens fewer an epoch")
    rows, at_once = data.train.order.num_rows(0), config.train.global_batch_size
    if rows < at_once:
        warn(
            f"data: an epoch has {rows} rows, fewer than one step takes (train.global_batch_size {at_once}): the rest "
            "of each step stays empty. Usually a smaller number trains better on so few records"
        )
    if config.data.held_out and data.held_out is None:
        warn(f"data: data.held_out {config.data.held_out:g} of so few records holds out none: no held-out loss")
    log(f"steps: {max_steps} ({data.train.epoch_at(max_steps):.2f} epochs), {config.train.global_batch_size} rows each")
