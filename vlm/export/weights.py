"""Run -> model folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlm.compat import prepare
from vlm.data.build import build_template
from vlm.data.template import ChatTemplate
from vlm.data.tokenize import ConversationTokenizer, adds_bos
from vlm.errors import CheckpointError
from vlm.export.card import draft_card
from vlm.export.evidence import CARD, copy_proof, evidence_sections, read_figures
from vlm.export.fingerprint import fingerprint_files
from vlm.export.folder import replace_folder
from vlm.export.hf import why_not_llava, write_llava
from vlm.export.manifest import Manifest, write_manifest
from vlm.export.parts import LLM, Trained, check_shard_size, read_run, write_parts
from vlm.faults import fault
from vlm.logs import log
from vlm.models.build import Assembled, build_image_spec, build_model
from vlm.models.llm import load_tokenizer
from vlm.models.trainable import load_weights, merge_lora, part_weights
from vlm.models.vision import build_vision, save_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DType = Literal["auto", "fp32", "bf16"]


def export_run(
    run: str | Path,
    out: str | Path | None = None,
    full: bool = False,
    max_shard_size: str = "5GB",
    dtype: DType = "auto",
) -> Path:
    """Write what a run trained into a folder to use, publish, or start the next stage from.

    The folder appears complete or not at all; an older export at the same place is replaced at the very end.

    Args:
        run: the output_dir of a run. Its newest intact checkpoint is taken.
        out: the folder to write; None is `<run>/export`, or `<run>/export-full` with `full`.
        full: merge everything into a folder that needs no base models: in transformers' LLaVA layout if the encoder
            and projector can be expressed in it, else as a vlm folder.
        max_shard_size: no weight file of the language model is larger, e.g. "5GB" or "200MB".
        dtype: of a full export's weights; "auto" is that of the base language model.

    Returns:
        the export folder.

    Raises:
        CheckpointError: no intact checkpoint, or the base models do not fit it.
        ConfigError: `out` holds something else, or cannot be written.
    """
    prepare()
    check_shard_size(max_shard_size)
    run = Path(run)
    trained = read_run(run)
    final = Path(out) if out is not None else run / ("export-full" if full else "export")
    tokenizer = load_tokenizer(trained.model.llm.path, trained.model.trust_remote_code)
    template = replace(build_template(trained.data.template, tokenizer), image_order=trained.image_order)
    if trained.data.system is not None:  # other programs know of the template only
        template = replace(template, default_system=trained.data.system)
    with replace_folder(final) as folder:
        if full:
            manifest, notes = _write_full(folder, trained, template, max_shard_size, dtype)
        else:
            manifest, notes = _write_trained(folder, trained, max_shard_size), []
        fault("export:weights")
        if manifest.layout == "vlm":
            _write_tokenizer(folder, tokenizer, template)
        evidence = evidence_sections(copy_proof(run, folder), read_figures(run, trained.origin.get("steps")))
        (folder / CARD).write_text(draft_card(manifest, final.name, notes, evidence), encoding="utf-8")
        write_manifest(folder, manifest)
    size = sum(file.stat().st_size for file in final.rglob("*") if file.is_file())
    log(f"{final}: {', '.join(manifest.included)}, {size / 1e6:,.1f} MB; try: vlm chat {final}")
    return final


def _write_trained(folder: Path, trained: Trained, max_shard_size: str) -> Manifest:
    """The parts that trained; the base models stay where they are, with fingerprints to know them by."""
    included = write_parts(folder, trained, max_shard_size)
    manifest = _manifest(trained, included)
    model, base = trained.model, {}
    if "llm" in included:
        _write_llm_config(folder / LLM, trained)
        llm = model.llm.model_copy(update={"path": LLM, "pad_vocab_to_multiple_of": None})
        model = model.model_copy(update={"llm": llm})
    else:
        base["llm"] = fingerprint_files(model.llm.path)
    if model.vision is not None and "vision" in included:
        vision = save_architecture(build_vision(model.vision), model.vision, folder / "vision")
        model = model.model_copy(update={"vision": vision})
    elif model.vision is not None:
        file = model.vision.pretrained
        base["vision"] = fingerprint_files(file if file and Path(file).is_file() else model.vision.path)
    return replace(manifest, base=base, model=model)


def _write_full(
    folder: Path, trained: Trained, template: ChatTemplate, max_shard_size: str, dtype: DType
) -> tuple[Manifest, list[str]]:
    built = build_merged(trained, dtype)
    reason = why_not_llava(trained.model, built)
    if reason is None:
        tokens = ConversationTokenizer(built.tokenizer, template)
        model, spec, notes = write_llava(folder, trained.model, built, tokens, max_shard_size)
        manifest = replace(_manifest(trained, ("projector", "llm", "vision")), model=model, image_spec=spec)
        return replace(manifest, layout="llava", full=True), notes
    log(f"written as a vlm folder, not in transformers' LLaVA layout: {reason}")
    everything = {name: t for part in ("projector", "vision") for name, t in part_weights(built.model, part).items()}
    included = write_parts(folder, replace(trained, tensors=everything), max_shard_size)
    built.model.llm.save_pretrained(folder / LLM, max_shard_size=max_shard_size)
    changes: dict[str, Any] = {
        "llm": trained.model.llm.model_copy(update={"path": LLM, "pad_vocab_to_multiple_of": None}),
        "lora": None,
        "trainable": ("projector" if included else "llm",),
    }
    if built.model.vision is not None and trained.model.vision is not None:
        changes["vision"] = save_architecture(built.model.vision, trained.model.vision, folder / "vision")
    manifest = _manifest(trained, (*included, "llm"))
    manifest = replace(manifest, full=True, model=trained.model.model_copy(update=changes))
    return manifest, [f"Not in transformers' LLaVA layout: {reason}."]


def build_merged(trained: Trained, dtype: DType) -> Assembled:
    """The whole model with adapters folded in, in the dtype of the export. Summed in float32 first."""
    adapters = ("llm.lora",) if trained.part("llm.lora") else ()
    built = build_model(trained.model.model_copy(update={"trainable": adapters}), precision="fp32")
    try:
        load_weights(built.model, trained.tensors, where="the checkpoint", partial=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nThe base models may have changed since the training") from None
    merge_lora(built.model)
    target = {"auto": _dtype_on_disk(trained.model.llm.path), "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for part in (built.model.llm, built.model.vision):
        if part is not None:
            part.to(target)
    return built  # the projector stays float32 until its statistics are folded in


def _dtype_on_disk(path: str) -> torch.dtype:
    from transformers import AutoConfig

    named = getattr(AutoConfig.from_pretrained(path), "dtype", None)
    return named if named in (torch.bfloat16, torch.float16, torch.float32) else torch.float32


def _write_llm_config(folder: Path, trained: Trained) -> None:
    """config.json beside trained weights of the whole language model, so that transformers loads the folder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(trained.model.llm.path)
    tensors = trained.part("llm")
    embedding = next((tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None:
        config.vocab_size = len(embedding)  # grown by pad_vocab_to_multiple_of
    config.dtype = next(iter(tensors.values())).dtype
    config.save_pretrained(folder)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> None:
    """Tokenizer files, with the template that the model was trained on."""
    tokenizer.chat_template = template.jinja(tokenizer.bos_token, tokenizer.eos_token, adds_bos(tokenizer))
    tokenizer.save_pretrained(folder)


def _manifest(trained: Trained, included: tuple[str, ...]) -> Manifest:
    vision = trained.model.vision
    return Manifest(
        model=trained.model,
        template=trained.data.template,
        system=trained.data.system,
        image_spec=build_image_spec(trained.model),
        included=included,
        trained=trained.trained,
        image_order=trained.image_order,
        origin={
            **trained.origin,
            "llm": trained.model.llm.path,
            "vision": None if vision is None else vision.path,
        },
    )
