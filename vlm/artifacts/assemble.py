"""The model of an export, put together from the export's files and, unless it is complete, its base models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm.artifacts.adapter import Adapter, check_loaded_base, fold_adapter, fold_peft
from vlm.artifacts.fingerprint import fingerprint_files, refuse_other_base
from vlm.artifacts.layouts import open_parts
from vlm.artifacts.llava import LLAVA, llava_projector, llm_shape
from vlm.artifacts.manifest import Manifest, inside
from vlm.artifacts.parts import ADAPTER_CONFIG
from vlm.artifacts.peft_adapter import PeftAdapter
from vlm.errors import CheckpointError
from vlm.logs import warn
from vlm.models.build import Assembled, assemble
from vlm.models.config import ModelConfig
from vlm.models.encoders.kinds import encoder_weights
from vlm.models.llm import (
    choose_attention,
    load_llm,
    load_tokenizer,
    pad_vocabulary,
    refuse_beyond_embedding,
    settle_attention,
)
from vlm.models.quantize import round_linears
from vlm.models.trainable import cast_weights, load_weights, part_of, part_weights
from vlm.models.vision import VisionEncoder, build_vision
from vlm.models.weight_files import WeightFiles

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerFast


_BIAS = "lm_head.bias"
_REPORTED = {"missing": "missing_keys", "not in the class": "unexpected_keys", "of another shape": "mismatched_keys"}
OnProgress = Callable[[float], None]  # hears the share that is done, 0..1


def assemble_export(
    folder: Path,
    manifest: Manifest,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Adapter | PeftAdapter | None = None,
    on_progress: OnProgress = lambda fraction: None,
    *,
    tokenizer: Path | None = None,
) -> Assembled:
    """Everything frozen, in evaluation mode, adapters merged; on the CPU still.

    Args:
        device: where it will compute, which decides about the attention kernel.
        tokenizer: a folder whose tokenizer takes the place of the export's.
        on_progress: the language model counts for most.

    Raises:
        CheckpointError: see `vlm.inference.load.load`.
    """
    has_own = False
    if manifest.layout == LLAVA:
        built = _from_llava(folder, manifest, dtype, device, tokenizer or folder)
    else:
        replaces_own = isinstance(adapter, Adapter) and adapter.replaces_own
        has_own = "llm.lora" in manifest.included and not replaces_own
        built = _from_parts(folder, manifest, dtype, device, has_own, on_progress, tokenizer or folder)
    model = built.model
    if isinstance(adapter, PeftAdapter):
        fold_peft(model, adapter)
    elif adapter is not None:
        if "llm" in manifest.included:
            check_loaded_base(model, adapter, folder)
        if adapter.quantization is not None and not has_own:  # what it was trained beside
            round_linears(model.llm, adapter.quantization, torch.device("cpu"))
        fold_adapter(model, adapter.lora, adapter.tensors, f"--adapter {adapter.folder}")
    if tokenizer is not None:
        refuse_beyond_embedding(built.tokenizer, len(model.llm.get_input_embeddings().weight), str(tokenizer))
    cast_weights(model.llm, dtype)
    model.requires_grad_(False).eval()
    if model.vision is not None and manifest.model.vision is not None:
        model.vision.settle(model.vision.choose(manifest.model.vision, dtype, device))
        if model.vision.compute is None:
            model.vision.to(dtype)
    on_progress(0.9)
    return replace(built, image_spec=manifest.image_spec)


def _from_parts(
    folder: Path,
    manifest: Manifest,
    dtype: torch.dtype,
    device: torch.device,
    has_adapter: bool,
    on_progress: OnProgress,
    tokenizer_at: Path,
) -> Assembled:
    config = inside(folder, manifest.model, manifest.included)
    _check_base_models(folder, manifest, config)
    tensors = open_parts(folder, manifest, config)
    if has_adapter:
        _check_adapter(folder, config)
    lora = dict(tensors.only(name for name in tensors if part_of(name) == "llm.lora"))
    tensors = tensors.only(name for name in tensors if part_of(name) not in ("llm", "llm.lora"))  # llm: by load_llm
    tokenizer = load_tokenizer(str(tokenizer_at))
    on_progress(0.1)
    llm = load_llm(config.llm, dtype, device=str(device), trust_remote_code=config.trust_remote_code)
    if config.llm.pad_vocab_to_multiple_of:
        pad_vocabulary(llm, len(tokenizer) - 1, config.llm.pad_vocab_to_multiple_of)
    if config.llm.quantization is not None and has_adapter:  # what the adapter was trained beside
        round_linears(llm, config.llm.quantization, torch.device("cpu"))
    on_progress(0.6)
    vision = None
    if config.vision is not None:
        vision = build_vision(config.vision, dtype, weights="vision" not in manifest.included)
    on_progress(0.75)
    config = config.model_copy(update={"trainable": ()})
    model, spec, image_token_id = assemble(config, llm, vision, tokenizer, manifest.scores)
    load_weights(model, tensors, where=str(folder))
    missing = sorted(part_weights(model, "projector").keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}. vlm.json or projector.safetensors was edited or replaced: export "
            "the run again"
        )
    if has_adapter:
        assert config.lora is not None
        fold_adapter(model, config.lora, lora, str(folder))
    return Assembled(model, tokenizer, spec, image_token_id)


def _from_llava(
    folder: Path, manifest: Manifest, dtype: torch.dtype, device: torch.device, tokenizer_at: Path
) -> Assembled:
    config = inside(folder, manifest.model, manifest.included)
    tokenizer = load_tokenizer(str(tokenizer_at))
    whole = read_llava(folder, dtype, choose_attention(config.llm.attention, str(device)))
    assert config.vision is not None
    vision = build_vision(config.vision, dtype, weights=False)
    trunk: Any = vision.trunk
    num_blocks = len(trunk.blocks)
    trunk.model = whole.model.vision_tower
    del trunk.blocks[num_blocks:]  # of another program's folder, which holds them all
    llm = _language_model(whole)
    settle_attention(llm, config.llm.attention)
    return wrap_llava(whole, config, llm, vision, tokenizer)


def read_llava(folder: Path, dtype: torch.dtype, attention: str | None) -> LlavaForConditionalGeneration:
    """transformers' own class around the weights of a folder, every one of which has its place.

    Args:
        attention: of the language model; None leaves the choice to transformers.

    Raises:
        CheckpointError: it does not load; or a weight is missing, or is one that the class does not have.
    """
    from transformers import LlavaForConditionalGeneration

    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True,
            attn_implementation=attention and {"text_config": attention},
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot load its weights ({str(error)[:300]}). Export the run again") from None
    whole, report = loaded
    unknown = {name for name in report["unexpected_keys"] if "vision_tower." not in name}  # a pooling head is unused
    if unknown == {_BIAS}:  # earlier versions wrote it for heads that have one, which the class drops
        files = WeightFiles(str(folder), "the export")
        name = next(name for name in files.shapes if name.endswith(_BIAS))  # files have a level more
        whole.lm_head.bias = nn.Parameter(files.read(name).to(dtype), requires_grad=False)
        warn(
            f"{folder}: transformers' LLaVA class leaves {_BIAS} of this export out; vlm does not. Export the run again"
        )
        unknown = set()
    report["unexpected_keys"] = unknown
    problems = [f"  {name}: {what}" for what, key in _REPORTED.items() for name in sorted(report[key])]
    if problems:  # of exports from before each was read back
        shown = "\n".join(problems[:10]) + (f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(
            f"{folder}: its weights are not those of transformers' LLaVA class, which would compute something else "
            f"without a word:\n{shown}\nIt was written by an earlier version or edited: export the run again"
        )
    return whole


def wrap_llava(
    whole: LlavaForConditionalGeneration,
    config: ModelConfig,
    llm: PreTrainedModel,
    vision: VisionEncoder,
    tokenizer: PreTrainedTokenizerFast,
) -> Assembled:
    """Our model around the modules of transformers' one.

    Args:
        config: what `vlm.export.hf.write_llava` says of the folder.
        llm, vision: ours, with the language model and the tower of `whole` in them.
    """
    model, spec, image_token_id = assemble(config.model_copy(update={"trainable": ()}), llm, vision, tokenizer)
    theirs = {name: tensor for name, tensor in whole.state_dict().items() if "multi_modal_projector" in name}
    load_weights(model, llava_projector(whole.config).to_ours(theirs), where="LLaVA's projector", partial=True)
    return Assembled(model, tokenizer, spec, image_token_id)


def _language_model(whole: LlavaForConditionalGeneration) -> PreTrainedModel:
    """The causal language model inside LLaVA: its own class around the same modules."""
    llm = llm_shape(whole.config.text_config)
    setattr(llm, llm.base_model_prefix, whole.model.language_model)
    llm.set_output_embeddings(whole.lm_head)
    llm.generation_config = whole.generation_config
    return llm.eval()


def _check_base_models(folder: Path, manifest: Manifest, config: ModelConfig) -> None:
    """The base models must be the very ones that the parts were trained beside."""
    paths = {"llm": config.llm.path, **encoder_weights(config.vision)}
    for part, path in paths.items():
        expected = manifest.base.get(part)
        if expected:
            refuse_other_base(expected, fingerprint_files(path), f"model.{part}.path {path}", folder)


def _check_adapter(folder: Path, config: ModelConfig) -> None:
    """adapter_config.json, which peft reads, and vlm.json must say the same."""
    path = folder / ADAPTER_CONFIG
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        found = {"r": written["r"], "lora_alpha": written["lora_alpha"]}
        found |= {key: bool(written.get(key, False)) for key in ("use_rslora", "use_dora")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}). Export the run again") from None
    assert config.lora is not None
    lora = config.lora
    expected = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "use_dora": lora.dora}
    lines = [f"  {key}: {expected[key]} -> {found[key]}" for key in expected if expected[key] != found[key]]
    if lines:
        raise CheckpointError(
            f"{path} differs from vlm.json (vlm.json -> adapter_config.json):\n"
            + "\n".join(lines)
            + "\nOne of them was edited, or the adapter is another one. Export the run again"
        )
