"""Run -> model folder, which is read back before it is called one."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from vlm.artifacts.card import draft_card, public_name
from vlm.artifacts.evidence import CARD, copy_proof, evidence_sections, read_figures
from vlm.artifacts.fingerprint import fingerprint_files
from vlm.artifacts.folder import replace_folder
from vlm.artifacts.manifest import Manifest, write_manifest
from vlm.artifacts.older import finish_folder
from vlm.artifacts.parts import LLM, Trained, read_run, write_parts
from vlm.artifacts.shards import check_shard_size
from vlm.artifacts.tokenizer import hand_over
from vlm.compat import prepare
from vlm.data.build import build_template
from vlm.data.tokenize import ConversationTokenizer, adds_bos
from vlm.errors import CheckpointError
from vlm.export.hf import NotLlavaError, generation_config, why_not_llava, write_llava, write_preprocessor
from vlm.export.read_back import Answers, ask, check_readable
from vlm.faults import fault
from vlm.logs import log
from vlm.models.build import Assembled, build_model
from vlm.models.config import VisionConfig
from vlm.models.encoders.kinds import encoder_weights
from vlm.models.llm import dtype_on_disk
from vlm.models.trainable import cast_weights, load_weights, merge_lora, part_of, part_weights, partial_names
from vlm.models.vision import save_architecture
from vlm.models.weight_files import WeightFiles
from vlm.precision import DTYPES

DType = Literal["auto", "fp32", "bf16", "fp16"]
Layout = Literal["llava", "vlm"]
_MEMORY_SHARE = 0.8  # of what is free, for the weights that are read back


def export_run(
    run: str | Path,
    out: str | Path | None = None,
    full: bool = False,
    max_shard_size: str = "5GB",
    dtype: DType = "auto",
    step: int | None = None,
    layout: Layout = "llava",
) -> Path:
    """Write what a run trained into a folder to use, publish, or start the next stage from.

    The folder appears complete or not at all; an older export at the same place is replaced at the very end.

    Args:
        run: the output_dir of a run.
        out: the folder to write; None is `<run>/export`, or `<run>/export-full` with `full`, and ends with the step if
            one is named.
        full: merge everything into a folder that needs no base models: in transformers' LLaVA layout if the encoder
            and projector can be expressed in it, else as a vlm folder. Without an encoder it is a language model of
            transformers.
        max_shard_size: no weight file of the language model is larger, e.g. "5GB" or "200MB".
        dtype: of the weights of encoder and language model that are written; "auto" is, of a full export, that of the
            base language model, else that of the training.
        step: of the checkpoint; None takes the newest intact one.
        layout: of a full export with an encoder: "vlm" is always a vlm folder, which another stage can start from;
            transformers' has the statistics of a projector folded into its weights.

    Returns:
        the export folder.

    Raises:
        CheckpointError: no intact checkpoint, or the base models do not fit it.
        ConfigError: `out` holds something else, or cannot be written.
    """
    prepare()
    check_shard_size(max_shard_size)
    run = Path(run)
    trained = read_run(run, step)
    final = Path(out) if out is not None else run / default_name(full, step)
    with replace_folder(final) as folder:
        write = partial(_write_full, layout=layout) if full else write_trained
        written = write(folder, trained, max_shard_size, dtype)
        fault("export:weights")
        evidence = evidence_sections(copy_proof(run, folder), read_figures(run, trained.origin.get("steps")))
        trained.tensors.clear()
        worst = finish_export(folder, final, written, evidence)
    tell_export(final, written.manifest, f"read back: the trained model's answers (largest difference {worst:.0e})")
    return final


def finish_export(folder: Path, final: Path, written: Written, evidence: Sequence[str] = ()) -> float:
    """Model card, manifest and what other programs need, beside the weights; then the folder is read back.

    Args:
        folder: where it lies until it is whole.
        final: what it will be called.
        evidence: sections of the model card.

    Returns:
        the largest difference, as `check_readable`.

    Raises:
        CheckpointError: it cannot be read back.
    """
    manifest = written.manifest
    (folder / CARD).write_text(draft_card(manifest, final.name, written.notes, evidence), encoding="utf-8")
    write_manifest(folder, manifest)
    if manifest.image_spec is not None:
        write_preprocessor(folder, manifest.image_spec)
    finish_folder(folder)
    gc.collect()  # the model that was written, before the other one comes
    return check_readable(folder, written.answers, written.dtype)


def tell_export(final: Path, manifest: Manifest, what: str) -> None:
    """One line: what is in the folder, how large it is, and what to do with it."""
    size = sum(file.stat().st_size for file in final.rglob("*") if file.is_file())
    use = f"vlm predict {final} --data FILE" if manifest.scores else f"vlm chat {final}"
    log(f"{final}: {', '.join(manifest.included)}, {size / 1e6:,.1f} MB; {what}; try: {use}")


def default_name(full: bool, step: int | None) -> str:
    """
    >>> default_name(False, None), default_name(True, 500)
    ('export', 'export-full-step-500')
    """
    return ("export-full" if full else "export") + ("" if step is None else f"-step-{step}")


@dataclass(frozen=True)
class Written:
    """What a folder holds, and what it has to answer when it is read back with weights in `dtype`."""

    manifest: Manifest
    answers: Answers
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)


def write_trained(folder: Path, trained: Trained, max_shard_size: str, dtype: DType) -> Written:
    """The parts that trained; the base models stay where they are, with fingerprints to know them by."""
    if dtype != "auto":
        trained = replace(trained, tensors=rounded(trained.tensors, DTYPES[dtype]))
    precision = _precision_to_read(trained.model.llm.path)
    built = build_merged(trained, None, precision)
    trained = _with_whole_parts(trained, built, dtype)
    included = write_parts(folder, trained, max_shard_size)
    tokens = _build_tokens(trained, built)
    answers = ask(built, tokens)
    manifest = _manifest(trained, included, built, tokens)
    model, base = trained.model, {}
    if "llm" in included:
        built.model.llm.config.dtype = next(iter(trained.part("llm").values())).dtype
        _write_llm_config(folder / LLM, built, tokens)
        llm = model.llm.model_copy(update={"path": LLM, "pad_vocab_to_multiple_of": None, "quantization": None})
        model = model.model_copy(update={"llm": llm})
    else:
        base["llm"] = fingerprint_files(model.llm.path)
    if model.vision is not None and "vision" in included:
        model = model.model_copy(update={"vision": _write_encoder_config(folder, model.vision, built)})
    elif model.vision is not None:
        base |= {name: fingerprint_files(path) for name, path in encoder_weights(model.vision).items()}
    _write_tokenizer(folder, built, tokens)
    return Written(replace(manifest, base=base, model=model), answers, DTYPES[precision])


def _write_full(folder: Path, trained: Trained, max_shard_size: str, dtype: DType, layout: Layout) -> Written:
    built = build_merged(trained, dtype)
    trained = _with_whole_parts(trained, built)
    reason = "asked for so" if layout == "vlm" else why_not_llava(trained.model, built)
    if reason is None:
        try:
            return _write_llava(folder, trained, built, max_shard_size)
        except NotLlavaError as error:
            reason = f"transformers' LLaVA class does not compute the same with its parts ({error})"
            built = build_merged(trained, dtype)  # the other one was taken apart
    notes = []
    if trained.model.vision is not None:
        log(f"written as a vlm folder, not in transformers' LLaVA layout: {reason}")
        notes = [f"Not in transformers' LLaVA layout: {reason}."]
    tokens, llm, place = (
        _build_tokens(trained, built),
        built.model.llm,
        LLM if trained.model.vision is not None else ".",
    )
    answers = ask(built, tokens)
    manifest = _manifest(trained, (), built, tokens)
    everything = {
        name: t for part in ("projector", "vision", "value_head") for name, t in part_weights(built.model, part).items()
    }
    included = write_parts(folder, replace(trained, tensors=everything), max_shard_size)
    llm.generation_config = generation_config(built, tokens)
    llm.save_pretrained(folder / place, max_shard_size=max_shard_size)
    _write_llm_config(folder / place, built, tokens)
    changes: dict[str, Any] = {
        "llm": trained.model.llm.model_copy(
            update={"path": place, "pad_vocab_to_multiple_of": None, "quantization": None}
        ),
        "lora": None,
        "trainable": ("projector" if "projector" in included else "llm",),
    }
    if trained.model.vision is not None:
        changes["vision"] = _write_encoder_config(folder, trained.model.vision, built)
    _write_tokenizer(folder, built, tokens)
    manifest = replace(manifest, included=(*included, LLM), model=trained.model.model_copy(update=changes))
    return Written(_without_places(manifest), answers, llm.dtype, notes)


def _write_llava(folder: Path, trained: Trained, built: Assembled, max_shard_size: str) -> Written:
    """Raises NotLlavaError before anything is written."""
    tokens, dtype = _build_tokens(trained, built), built.model.llm.dtype
    answers = ask(built, tokens)
    manifest = _manifest(trained, ("projector", LLM, "vision"), built, tokens)
    model, spec, written, notes = write_llava(folder, trained.model, built, tokens, answers, max_shard_size)
    if dtype != torch.float32:  # what was folded in has been rounded
        answers = ask(written, tokens)
    manifest = replace(manifest, model=model, image_spec=spec, layout="llava")
    return Written(_without_places(manifest), answers, dtype, notes)


def _build_tokens(trained: Trained, built: Assembled) -> ConversationTokenizer:
    template = replace(build_template(trained.data.template, built.tokenizer), image_order=trained.image_order)
    if trained.data.system is not None:  # other programs know of the template only
        template = replace(template, default_system=trained.data.system)
    return ConversationTokenizer(
        built.tokenizer,
        template,
        image_token_id=built.image_token_id,
        tokens_per_image=built.image_spec or 0,
        system=trained.data.system,
    )


def build_merged(trained: Trained, dtype: DType | None, precision: str = "fp32") -> Assembled:
    """The whole model with adapters folded in, in evaluation mode.

    Args:
        dtype: of language model and encoder; the projector stays float32 until its statistics are folded in. None
            leaves them as they were loaded.
        precision: in which the language model is loaded and the adapters are added to it; the encoder in float32.
    """
    adapters = tuple(part for part in ("llm.lora", "vision.lora", "value_head") if trained.part(part))
    changes: dict[str, Any] = {"trainable": adapters, "partial": {}}
    if trained.model.vision is not None:
        changes["vision"] = trained.model.vision.model_copy(update={"compute": "fp32"})
    built = build_model(trained.model.model_copy(update=changes), precision=precision, packs=False)
    try:
        load_weights(built.model, trained.tensors, where="the checkpoint", partial=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nThe base models may have changed since the training") from None
    merge_lora(built.model)
    if not trained.scores:
        built.model.value_head = None
    if "llm" in trained.model.partial:  # an adapter that it began with was merged before these trained
        names = {f"llm.{name}" for name in partial_names(built.model.llm, trained.model.partial["llm"], "llm")}
        last = {name: tensor for name, tensor in trained.tensors.items() if name in names}
        load_weights(built.model, last, where="the checkpoint", partial=True)
    built.model.eval()
    for part in (built.model.llm, built.model.vision):
        if part is not None and dtype is not None:
            cast_weights(part, dtype_on_disk(trained.model.llm.path) if dtype == "auto" else DTYPES[dtype])
    return built


def _with_whole_parts(trained: Trained, built: Assembled, dtype: DType = "auto") -> Trained:
    """With all weights of a part of which some trained, and with the encoder in place of adapters on it.

    Args:
        built: the merged model. What of it did not train is written in the number format of its files, or in `dtype`;
            it is rounded to what is written.
    """
    model, whole, merged = trained.model, dict[str, Tensor](), {"vision.lora"}
    if not trained.scores:
        merged.add("value_head")
    may_lack_output = "llm" in model.trainable and bool(trained.part("value_head"))  # nothing reads it of a scorer
    if "llm" in model.partial or may_lack_output:
        on_disk = dtype_on_disk(model.llm.path)
        merged.add("llm.lora")
        llm = part_weights(built.model, "llm")
        whole |= {name: tensor if name in trained.tensors else tensor.to(on_disk) for name, tensor in llm.items()}
    if "vision" in model.partial or trained.part("vision.lora"):
        whole |= part_weights(built.model, "vision")
    whole = whole if dtype == "auto" else rounded(whole, DTYPES[dtype])
    load_weights(built.model, whole, where="the merged model", partial=True)
    kept = {name: tensor for name, tensor in trained.tensors.items() if part_of(name) not in merged}
    changes: dict[str, Any] = {
        "partial": {},
        "vision_lora": None,
        "trainable": tuple(part for part in _without_vision_lora(model.trainable) if part not in merged - {"llm.lora"}),
    }
    if "llm.lora" in merged:
        changes["lora"] = None
    parts = tuple(part for part in _without_vision_lora(trained.trained) if part not in merged)
    return replace(trained, model=model.model_copy(update=changes), tensors=kept | whole, trained=parts)


def _without_vision_lora(parts: Sequence[str]) -> tuple[str, ...]:
    """
    >>> _without_vision_lora(("projector", "vision", "vision.lora"))
    ('projector', 'vision')
    """
    return tuple(dict.fromkeys("vision" if part == "vision.lora" else part for part in parts))


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical name -> tensor [...], those of encoder and language model in `dtype`."""
    parts = ("llm", "vision")
    return {
        name: tensor.to(dtype) if part_of(name) in parts and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _precision_to_read(path: str) -> Literal["fp32", "bf16", "fp16"]:
    """float32 if the language model fits into memory so, else the number format of its files.

    Raises:
        CheckpointError: it does not fit at all.
    """
    num_weights = sum(math.prod(shape) for shape in WeightFiles(path).shapes.values())
    free = psutil.virtual_memory().available
    if 4 * num_weights < _MEMORY_SHARE * free:
        return "fp32"
    if 2 * num_weights < _MEMORY_SHARE * free:
        return "fp16" if dtype_on_disk(path) == torch.float16 else "bf16"
    raise CheckpointError(
        f"an export is read back before it is called one, which takes {2 * num_weights / 2**30:.1f} GiB of memory for "
        f"{path}; {free / 2**30:.1f} GiB are free. Export on a machine that can hold the language model"
    )


def _write_llm_config(folder: Path, built: Assembled, tokens: ConversationTokenizer) -> None:
    """config.json and generation_config.json beside the language model's weights, so that transformers loads the folder
    and a server of it knows where replies end."""
    config = built.model.llm.config
    config.get_text_config(decoder=True).eos_token_id = sorted(tokens.stop_ids)
    config.save_pretrained(folder)
    generation_config(built, tokens).save_pretrained(folder)


def _write_encoder_config(folder: Path, config: VisionConfig, built: Assembled) -> VisionConfig:
    """What the encoder is, beside its weights, and what its images look like. Returns the config that names it."""
    vision, spec = built.model.vision, built.image_spec
    assert vision is not None
    assert spec is not None
    named = save_architecture(vision, config, folder / "vision")
    for each, encoder in zip(spec.members, named.encoders, strict=True):
        if (folder / encoder.path).is_dir():  # else a name whose shape its library knows
            write_preprocessor(folder / encoder.path, each)
    return named


def _write_tokenizer(folder: Path, built: Assembled, tokens: ConversationTokenizer) -> None:
    """Tokenizer files, with the template that the model was trained on."""
    hand_over(built.tokenizer, tokens)
    built.tokenizer.save_pretrained(folder)


def _manifest(trained: Trained, included: tuple[str, ...], built: Assembled, tokens: ConversationTokenizer) -> Manifest:
    vision, bos = trained.model.vision, built.tokenizer.bos_token_id
    fused = [] if vision is None else [each.path for each in vision.fuse_with]
    return Manifest(
        model=trained.model,
        template=trained.data.template,
        system=trained.data.system,
        image_spec=built.image_spec,
        included=included,
        trained=trained.trained,
        image_order=trained.image_order,
        origin={
            **trained.origin,
            "llm": trained.model.llm.path,
            "vision": None if vision is None else vision.path,
            **({"fused_with": fused} if fused else {}),
        },
        stop_ids=tuple(sorted(tokens.stop_ids)),
        begins=bos is not None and adds_bos(built.tokenizer),
    )


def _without_places(manifest: Manifest) -> Manifest:
    """A whole export, which may go anywhere, names no folders of the machine that made it."""
    return replace(manifest, full=True, origin={key: public_name(value) for key, value in manifest.origin.items()})
