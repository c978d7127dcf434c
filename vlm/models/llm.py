"""Language models and tokenizers, from a local folder or a name that transformers resolves."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from vlm.compat import prepare, quiet_progress
from vlm.errors import CheckpointError, ConfigError
from vlm.logs import warn
from vlm.models.config import LLMConfig
from vlm.models.decoders import find_decoder
from vlm.models.families import packing_of, refuse_decoder
from vlm.models.folder import why_beyond_embedding, why_no_tokenizer, why_no_weights
from vlm.models.head import find_logits_rule
from vlm.models.hub import check_hub
from vlm.models.native import why_not_a_decoder, why_not_native
from vlm.models.spm import differences
from vlm.models.tokenizer_files import COMPANIONS, VOCABULARIES, why_not_converted, write_converted
from vlm.models.varlen import VARLEN, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"  # its id marks the place of an image; its embedding is never read
_CHECKPOINT = "_gradient_checkpointing_func"  # transformers sets it on every block: forward, arguments -> output


def load_tokenizer(path: str, trust_remote_code: bool = False, *, image_token: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, with one more special token for image placeholders, and with a padding token.

    Neither needs a row in the embedding: placeholders are masked before the lookup, and padding is a token it has.
    A folder with `tokenizer.model` alone needs no code of its own: the vocabulary is converted (see
    `vlm.models.tokenizer_files`).

    Args:
        image_token: add that special token, if the tokenizer has it not.

    Raises:
        CheckpointError: it cannot be loaded without running its own code, or at all.
        ConfigError: it has no fast version, which the labels need.
    """
    prepare()
    check_hub(path, "model.llm.path")
    try:
        tokenizer = _read_tokenizer(path, trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(path, error, "its tokenizer") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(f"model.llm.path {path}: its tokenizer has no fast version (tokenizer.json)")
    if image_token and IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([_special(IMAGE_TOKEN)])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_llm(
    config: LLMConfig, dtype: torch.dtype, *, device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A decoder with its weights, in evaluation mode.

    Raises:
        CheckpointError: missing, incomplete, not safetensors, or a kind of model that only its own code could load.
        ConfigError: the attention implementation is not available here; or the type of model would be trained wrongly.
    """
    prepare()
    quiet_progress()
    from transformers import AutoModelForCausalLM

    refuse_foreign_code(config.path, trust_remote_code)
    refuse_decoder(_settings(config.path), config.path)
    if Path(config.path).is_dir() and (reason := why_no_weights(Path(config.path))):
        raise CheckpointError(f"model.llm.path {config.path}: cannot load its weights: {reason}")
    attention = choose_attention(config.attention, device)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(config.path, output_loading_info=True, **arguments)
        llm, report = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise _cannot_load(config.path, error, "its weights") from error
    if report["missing_keys"]:  # transformers would go on with random ones
        raise CheckpointError(
            f"model.llm.path {config.path}: its weights lack {len(report['missing_keys'])} tensors of "
            f"{type(llm).__name__}, e.g. {min(report['missing_keys'])}. Usually a shard was not downloaded"
        )
    find_logits_rule(llm, config.path)
    settle_attention(llm, config.attention)
    return llm.eval()


def llm_from_config(
    config: LLMConfig, dtype: torch.dtype = torch.bfloat16, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The decoder's shape with random weights, from config.json alone. For the meta device.

    Raises:
        CheckpointError: no config.json, a damaged one, or one of something else than a decoder.
    """
    prepare()
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_foreign_code(config.path, trust_remote_code)
    refuse_decoder(_settings(config.path), config.path)
    try:
        settings = AutoConfig.from_pretrained(config.path, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(config.path, error, "its config.json") from error


def _settings(path: str) -> dict[str, Any]:
    """config.json, of which `refuse_foreign_code` knows that it can be read."""
    from transformers import PretrainedConfig

    settings: dict[str, Any] = PretrainedConfig.get_config_dict(path)[0]
    return settings


def dtype_on_disk(path: str) -> torch.dtype:
    """The number format that a model's config.json says its weights have; float32 if it says none."""
    from transformers import AutoConfig

    named = getattr(AutoConfig.from_pretrained(path), "dtype", None)
    return named if named in (torch.bfloat16, torch.float16, torch.float32) else torch.float32


def refuse_foreign_code(path: str, trust_remote_code: bool) -> None:
    """A model whose class transformers does not know would need the Python files beside its weights.

    A native model whose folder brings code as well is loaded by transformers' own class, and that code stays unread.

    Raises:
        CheckpointError: unless the config says `model.trust_remote_code: true`.
    """
    from transformers import PretrainedConfig

    check_hub(path, "model.llm.path")
    try:
        settings = PretrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:
        raise _cannot_load(path, error, "its config.json") from error
    if reason := why_not_native(settings, trust_remote_code):
        raise CheckpointError(f"model.llm.path {path}: {reason}")
    if trust_remote_code and "auto_map" in settings:
        warn(f"RUNNING THE PYTHON CODE of {path}, because model.trust_remote_code is true")


def choose_attention(name: str, device: str) -> str | None:
    """What transformers is to load a decoder with; `settle_attention` then looks at the decoder itself.

    Returns:
        of auto, FlashAttention 2 on a GPU where it is installed; else, as for varlen and sdpa, None: transformers takes
        SDPA, but eager for the few families that have no SDPA (Gemma 2).
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    on_gpu = device.startswith("cuda")
    if name in ("auto", VARLEN, "sdpa"):
        return "flash_attention_2" if name == "auto" and on_gpu and has_flash else None
    if name == "flash_attention_2" and not (on_gpu and has_flash):
        missing = "a GPU" if has_flash else "the package flash-attn: pip install flash-attn --no-build-isolation"
        raise ConfigError(f"model.llm.attention flash_attention_2 needs {missing}. auto takes what there is here")
    if name == "flex_attention" and not on_gpu:
        raise ConfigError(
            "model.llm.attention flex_attention has no backward pass on the CPU. auto takes what there is here"
        )
    return name


def takes_varlen(llm: Any) -> bool:
    """Whether a decoder that transformers made can attend record by record: it has SDPA, and its type was measured."""
    return llm.config._attn_implementation == "sdpa" and packing_of(llm.config).by_varlen


def settle_attention(llm: Any, asked: str) -> None:
    """Let a decoder attend record by record (`vlm.models.varlen`), where its type can.

    Args:
        asked: `model.llm.attention`. auto takes varlen for what transformers runs with SDPA.

    Raises:
        ConfigError: varlen was asked for, and this type cannot.
    """
    can = takes_varlen(llm)
    if asked == VARLEN and not can:
        raise ConfigError(
            f"model.llm.attention varlen: model type {llm.config.model_type} is not known to attend rightly with it. "
            "auto takes what it can (docs/models.md)"
        )
    if can and asked in ("auto", VARLEN):
        register()
        for part in (llm, find_decoder(llm)):  # which may have configs of their own
            part.set_attn_implementation(VARLEN)


def refuse_beyond_embedding(tokenizer: PreTrainedTokenizerFast, num_rows: int, path: str) -> None:
    """Raises ConfigError where ids of text, or of the tokenizer's begin, end or padding token, have no row."""
    added = tokenizer.added_tokens_decoder
    size = 1 + max((number for number in tokenizer.get_vocab().values() if number not in added), default=-1)
    named = (
        (str(getattr(tokenizer, f"{n}_token")), getattr(tokenizer, f"{n}_token_id")) for n in ("bos", "eos", "pad")
    )
    if reason := why_beyond_embedding(size, named, num_rows):
        raise ConfigError(f"model.llm.path {path}: {reason}")


def enable_gradient_checkpointing(llm: PreTrainedModel) -> None:
    """Compute each layer again in the backward pass instead of keeping its activations."""
    settings = {"use_reentrant": False}  # the other kind needs an input with a gradient, which a frozen embedding lacks
    if hasattr(llm, "activation_checkpointing_enable"):  # its name in later transformers
        llm.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def recomputing_blocks(llm: Any) -> list[Any]:
    """The modules that compute their activations again in the backward pass, as long as they are in training mode."""
    from transformers import PreTrainedModel

    marked = [module for module in llm.modules() if getattr(module, "gradient_checkpointing", False)]
    return [module for module in marked if not isinstance(module, PreTrainedModel)] or marked


def keep_blocks_still(llm: Any) -> None:
    """Let the blocks of a frozen model compute as in evaluation although training mode is what they are asked for.

    Some classes (OPT, XGLM, Falcon) drop out in the block's own forward, by the block's own mode.
    """
    for block in recomputing_blocks(llm):
        checkpoint = getattr(block, _CHECKPOINT, None)
        if checkpoint is not None:
            setattr(block, _CHECKPOINT, partial(_checkpoint_in_evaluation, block, checkpoint))


def _checkpoint_in_evaluation(block: Any, checkpoint: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(_in_evaluation, block, forward), *args, **kwargs)


def _in_evaluation(block: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    was_training, block.training = block.training, False
    try:
        return forward(*args, **kwargs)
    finally:
        block.training = was_training


def pad_vocabulary(llm: Any, num_real: int, multiple: int, *, at_least: int = 0) -> None:
    """Grow the embedding to a multiple, for faster matrix products. New rows are the mean of the real ones.

    Args:
        num_real: rows that stand for tokens of the tokenizer; rows beyond are padding already.
        at_least: rows that there are to be.
    """
    old = llm.get_input_embeddings().weight.shape[0]
    if old % multiple == 0 and old >= at_least:
        return
    llm.resize_token_embeddings(-(-max(old, at_least) // multiple) * multiple, mean_resizing=False)
    with torch.no_grad():
        for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            for rows in (module.weight, getattr(module, "bias", None)):
                if rows is not None:
                    rows[old:] = rows[: min(num_real, old)].float().mean(0).to(rows.dtype)


def _read_tokenizer(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(path).is_dir() and (reason := why_no_tokenizer(Path(path), trust_remote_code)):
        raise CheckpointError(f"model.llm.path {path}: cannot load its tokenizer: {reason}")
    vocabulary = None
    if not _find_file(path, "tokenizer.json"):
        vocabulary = next((file for name in VOCABULARIES if (file := _find_file(path, name))), None)
    if vocabulary is None:
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except ValueError:
            if _find_file(path, "tokenizer.json") is None or trust_remote_code:
                raise
            # its class is of code beside the weights, which tokenizer.json makes unnecessary
            return PreTrainedTokenizerFast.from_pretrained(path)
    if trust_remote_code and why_not_converted(vocabulary):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    for name in COMPANIONS:
        _find_file(path, name)  # of a hub's model, brings it here
    with tempfile.TemporaryDirectory() as folder:
        write_converted(vocabulary.parent, Path(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.name_or_path = path
    if texts := differences(vocabulary, tokenizer.backend_tokenizer):
        warn(f"model.llm.path {path}: its tokenizer, made of {vocabulary.name}, writes {texts[0]!r} with other ids")
    return tokenizer


def _find_file(path: str, name: str) -> Path | None:
    """A file of a model folder, or of a model that the hub or its cache has."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _special(text: str) -> Any:
    from transformers import AddedToken

    return AddedToken(text, special=True, normalized=False)


def _cannot_load(path: str, error: Exception, what: str) -> CheckpointError:
    hint = "Usually the path is misspelt or the model hub cannot be reached"
    reason = str(error)[:300]
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        reason = "the folder holds no config.json"
        hint = "Expected a language model as transformers' save_pretrained writes it. Usually another folder was meant"
    elif "Unrecognized configuration class" in reason:  # and then the names of all classes
        named = re.search(r"\.(\w+)'>", reason)
        return CheckpointError(f"model.llm.path {path}: {why_not_a_decoder(named[1] if named else 'its config')}")
    if "attention implementation" in str(error) or "Flash Attention" in str(error):
        hint = "Set model.llm.attention to another one"
    return CheckpointError(f"model.llm.path {path}: cannot load {what} ({reason}). {hint}")
