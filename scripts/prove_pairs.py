"""Does `vlm adopt` make a project that trains of any encoder and decoder? Tries 12 x 30 families, and writes a table.

    python scripts/prove_pairs.py                                  # all pairs, docs/pairs.md
    python scripts/prove_pairs.py clip:llama efficientnet:mamba --out -  # some, printed

All are of toy size, with random weights. Each pair is adopted; its trial is trained for two steps, exported and read
back: `vlm export` compares image features and logits with the trained model's. The first trial with an encoder or a
decoder proves itself before its first step. A pair that is neither right nor refused by name makes the exit status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from prove_exports import Overheard
from safetensors.torch import save_file
from toy_decoders import toy_decoder

from vlm import run as run_module
from vlm.adopt.adopt import adopt
from vlm.compat import prepare, quiet_progress
from vlm.config import resolve_for_log
from vlm.config_checks import load_checked
from vlm.data.template import TEMPLATES, control_words
from vlm.errors import Preempted, VLMError
from vlm.export.run import export_run
from vlm.models.encoders.hf import TOWERS
from vlm.models.known import KNOWN

prepare()

_VIT = {"img_size": 56, "embed_dim": 48, "depth": 3, "num_heads": 2}
_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _VIT | {"patch_size": 14}),
    "eva02": ("eva02_tiny_patch14_224", _VIT),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "efficientnet": ("test_efficientnet", {}),
}
# transformers' model type, and settings beside those of toy size
_HF: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip_vision_model", {}),
    "dinov2": ("dinov2", {}),
    "dinov2_with_registers": ("dinov2_with_registers", {}),
    "dinov3": ("dinov3_vit", {"num_register_tokens": 4}),
    "eva_clip_g": ("blip_2_vision_model", {}),
}
_FUSED = ("dinov2", "siglip")
ENCODERS = (
    "clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3", "eva_clip_g", "open_clip", *_TIMM, "dinov2+siglip",
)  # fmt: skip
DECODERS = """
    llama qwen2 qwen3 qwen3_moe qwen3_next mistral mixtral internlm3 gemma gemma2 gemma3_text gemma3n_text phi phi3
    falcon bloom opt mpt gpt2 gpt_neox olmo2 granite cohere starcoder2 stablelm glm4 smollm3 deepseek_v3 mamba falcon_h1
""".split()  # noqa: SIM905 - a list of names is read in columns
CONTEXT = 512  # tokens that the positions of a toy reach
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
END, BEGIN = "<|endoftext|>", "<|begin|>"
TEXTS = [
    "Which shape is it? A circle. A square. A triangle. Which colour? It is red. It is green. It is blue, or yellow."
]


@dataclass
class Row:
    """A pair. `state`: right, refused or wrong; `reason`: why it is not right."""

    encoder: str
    decoder: str
    state: str
    reason: str = ""
    difference: float = 0.0  # of features and logits of the export, relative to the largest of them
    seconds: float = 0.0


def prove(encoder: str, decoder: str, parts: Path, proves: bool = True) -> Row:
    """Adopt, train, export and read back one pair.

    Args:
        parts: a folder in which the models lie, or are made: each once.
        proves: whether the trial proves itself before its first step.
    """
    began = time.monotonic()
    row = Row(encoder, decoder, "right")
    places = [str(_made(parts / name, lambda to, name=name: write_encoder(name, to))) for name in encoder.split("+")]
    llm = str(_made(parts / decoder, lambda to: write_decoder(decoder, to)))
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)  # where runs and caches go
        try:
            adopt(places, llm, Path("pair"), memory="24GiB")
        except VLMError as error:
            row.state, row.reason = "refused", _one_line(error)
        else:
            row.difference = _train_and_export(row, proves)
        finally:
            os.chdir(here)
    gc.collect()
    row.seconds = time.monotonic() - began
    return row


def _train_and_export(row: Row, proves: bool) -> float:
    """The difference with which the export is read back; what goes wrong is in `row`."""
    options = ["train.precision=fp32", "train.async_save=false", "train.log_level=error"]
    options += [] if proves else ["train.prove=false"]
    found: list[float] = []
    try:
        run = run_module.train(load_checked("pair/trial.yaml", options), resolve_for_log("pair/trial.yaml", options))
        with Overheard(found):
            export_run(run)
        steps = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert sum("loss" in json.loads(line) for line in steps) >= 2
    except Preempted:  # Ctrl-C or SIGTERM ends the script, not this pair alone
        raise
    except Exception as error:
        row.state, row.reason = "wrong", _one_line(error)
    return found[0] if found else 0.0


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    if not folder.exists():
        write(folder)
    return folder.resolve()


def write_encoder(name: str, folder: Path) -> None:
    """Files as the library itself writes them."""
    torch.manual_seed(0)
    if name == "open_clip":
        return _write_open_clip(folder)
    if name == "siglip":
        return _write_siglip(folder)
    if name in _TIMM:
        return _write_timm(folder, *_TIMM[name])
    import transformers

    kind, more = _HF[name]
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56,
        patch_size=14, **more,
    )  # fmt: skip
    model = getattr(transformers, TOWERS[kind].class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # Blip2's begin at 1e-10
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.save_pretrained(folder)


def _write_siglip(folder: Path) -> None:
    """Both towers in one folder, as SigLIP and SigLIP 2 are published."""
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32}
    SiglipModel(
        SiglipConfig(text_config=text, vision_config=sizes | {"image_size": 56, "patch_size": 14})
    ).save_pretrained(folder)


def _write_timm(folder: Path, architecture: str, arguments: dict[str, Any]) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model(architecture, num_classes=0, **arguments)
    side = arguments.get("img_size", 56)
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, side, side)}
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)


def _write_open_clip(folder: Path) -> None:
    import open_clip

    folder.mkdir(parents=True)
    vision = {"layers": 3, "width": 24, "head_width": 12, "patch_size": 14, "image_size": 56, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    values = {"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    whole = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


def write_decoder(model_type: str, folder: Path) -> None:
    """With a tokenizer that has the control tokens and the chat template of its family, if that has one."""
    from transformers import CONFIG_MAPPING

    tokenizer = _tokenizer(next((known.templates for known in KNOWN if known.model_type == model_type), ()))
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    context = {name: CONTEXT for name in _CONTEXT_NAMES if name in fields}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    toy_decoder(model_type, vocab_size=len(tokenizer), **ids, **context).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(templates: Sequence[str]) -> Any:
    """Byte-level BPE; of a family without a template, of a base model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = TEMPLATES[templates[0]] if templates else None
    words = [] if template is None else control_words(template)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[END, BEGIN, *words], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=BEGIN)
    if template is not None:
        tokenizer.chat_template = template.jinja(BEGIN, END, tokenizer_adds_bos=False)
    return tokenizer


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, VLMError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:400].replace("|", " ")


def as_markdown(rows: Sequence[Row], seconds: float) -> str:
    """docs/pairs.md."""
    import open_clip
    import timm
    import transformers

    counts = {state: sum(row.state == state for row in rows) for state in ("right", "refused", "wrong")}
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}, "
        f"open_clip {open_clip.__version__}"
    )
    rows = sorted(rows, key=lambda row: (_place(row.decoder, DECODERS), _place(row.encoder, ENCODERS)))
    encoders = sorted({row.encoder for row in rows}, key=lambda name: _place(name, ENCODERS))
    cells = {(row.decoder, row.encoder): row for row in rows}
    lines = [
        _HEAD.format(
            versions=versions, seconds=seconds, num=len(rows), share=counts["right"] / max(1, len(rows)), **counts,
            worst=max((row.difference for row in rows), default=0.0),
        ),
        _line("decoder", *encoders),
        "|---" * (len(encoders) + 1) + "|",
    ]  # fmt: skip
    for decoder in dict.fromkeys(row.decoder for row in rows):
        lines.append(_line(f"`{decoder}`", *(_cell(cells.get((decoder, encoder))) for encoder in encoders)))
    for state, title in (("wrong", "Wrong"), ("refused", "Refused by name")):
        reasons = dict.fromkeys((row.decoder, row.encoder, row.reason) for row in rows if row.state == state)
        if state == "refused":  # whose reason is the decoder's, or the encoder's, is said once
            reasons = {(decoder, "any", _of_part(reason)): None for decoder, _, reason in reasons}
        if reasons:
            lines += ["", f"## {title}", "", "| decoder | encoder | why |", "|---|---|---|"]
            lines += [_line(f"`{decoder}`", encoder, reason) for decoder, encoder, reason in reasons]
    return "\n".join(lines) + "\n"


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _of_part(reason: str) -> str:
    """Without the folders that were tried."""
    return reason.partition("nothing was written: ")[2].partition(": ")[2]


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return (
        "0"
        if row.state == "right" and row.difference == 0
        else f"{row.difference:.0e}"
        if row.state == "right"
        else row.state
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


_HEAD = """# Pairs of encoder and decoder

Written by `python scripts/prove_pairs.py`: {num} pairs of toy size with random weights, each adopted by `vlm adopt`,
trained for two steps by the project's own trial (projector and adapters), exported, and read back from the export's
folder. The first trial with each encoder and each decoder proves itself ([proof.md](proof.md)).
{versions}; {seconds:.0f} s.

**{right} pairs ({share:.1%}) are right, {refused} are refused by name, {wrong} are wrong.** The worst difference is
{worst:.0e}.

A number is the largest difference of image features and logits between the export and the model that was trained,
relative to the largest of them; a dash is a pair that was not tried. Tokenizers have the control tokens and the chat
template of the decoder's family; those of families without one are base models'. `eva_clip_g` is a Blip2 folder's
encoder, `vit`, `eva02`, `convnext` and `efficientnet` are of timm, `siglip` is a folder of both towers, `dinov2+siglip`
two encoders as one.
"""


def prove_all(pairs: Sequence[tuple[str, str]], kept: Path | None, tell: Callable[[str], None]) -> list[Row]:
    """
    Args:
        kept: a file of rows, one JSON object a line, to go on from and to add to.
    """
    known = _read_kept(kept)
    parts, rows = Path(tempfile.mkdtemp()), []
    proven = {name for row in known.values() if row.state == "right" for name in (row.encoder, row.decoder)}
    try:
        for pair in pairs:
            row = known.get(pair)
            if row is None:
                row = prove(*pair, parts, proves=not proven.issuperset(pair))
                proven |= set(pair) if row.state == "right" else set()
                tell(f"{row.encoder}:{row.decoder}: {row.state} {row.difference:.0e} {row.seconds:.1f} s {row.reason}")
                if kept is not None:
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
            rows.append(row)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return rows


def _read_kept(kept: Path | None) -> dict[tuple[str, str], Row]:
    """What is not wrong: the rest is tried again."""
    if kept is None or not kept.is_file():
        return {}
    rows = [Row(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()]
    return {(row.encoder, row.decoder): row for row in rows if row.state != "wrong"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="ENCODER:DECODER", help="some pairs; none: all")
    parser.add_argument("--out", default="docs/pairs.md", help="where to write; - prints")
    parser.add_argument("--keep", type=Path, help="a file of results to go on from; what was wrong is tried again")
    arguments = parser.parse_args()
    # every decoder once before any is tried again, so that what is wrong shows early
    turns = range(len(ENCODERS))
    pairs = [(ENCODERS[(n + turn) % len(ENCODERS)], name) for turn in turns for n, name in enumerate(DECODERS)]
    if arguments.pairs:
        pairs = [tuple(text.split(":", 1)) for text in arguments.pairs]
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    quiet_progress()
    gc.collect()
    gc.freeze()  # what is imported: each export collects, and would look at all of it again
    run_module._plot = lambda run: None  # a chart of two steps takes a tenth of the time
    began = time.monotonic()
    rows = prove_all(pairs, arguments.keep, lambda line: print(line, file=sys.stderr, flush=True))
    text = as_markdown(rows, sum(row.seconds for row in rows) or time.monotonic() - began)
    if arguments.out == "-":
        print(text)
    else:
        Path(arguments.out).write_text(text, encoding="utf-8")
    sys.exit(any(row.state == "wrong" for row in rows))


if __name__ == "__main__":
    main()
