"""Can every export be read back? Makes exports of many encoders and decoders, reads each back, and writes a table.

    python scripts/prove_exports.py                                     # all of them, docs/exports.md
    python scripts/prove_exports.py test_vit siglip:layer=-2 phi --out -  # some, printed

Weights are random; encoders of timm have their own sizes, all else is of toy size. `vlm export` itself reads back: an
export that answers otherwise than the model it was made of ends with an error, which is a line of the table and makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo.tiny import tiny_tokenizer, write_encoder, write_llm
from safetensors.torch import save_file
from toy_decoders import toy_decoder

from vlm.artifacts.pins import pin_start
from vlm.compat import prepare
from vlm.export import run as export_module
from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.models.trainable import trained_weights
from vlm.train.checkpoint import save_checkpoint

prepare()

TIMM = """
    vit_tiny_patch16_384 vit_small_patch16_384 vit_small_patch32_384 deit3_small_patch16_384 test_vit test_vit2
    test_vit3 eva02_tiny_patch14_336 eva02_small_patch14_336 vit_small_patch14_dinov2
    vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3 swin_tiny_patch4_window7_224 swin_s3_tiny_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_384 cait_xxs24_384 xcit_nano_12_p16_384 maxvit_tiny_tf_384
    volo_d1_384 mixer_s32_224 convnext_atto tf_efficientnet_lite0 vit_base_patch16_siglip_256
    vit_base_patch16_clip_384 beit_base_patch16_384 vit_wee_patch16_reg1_gap_256 hiera_tiny_224 gcvit_xxtiny
    coatnet_nano_rw_224 mobilevit_xxs fastvit_t8 tiny_vit_21m_384 tiny_vit_21m_512 levit_128s efficientvit_b0
    nextvit_small vit_xsmall_patch16_clip_224 vit_betwixt_patch16_reg4_gap_256 twins_svt_small edgenext_xx_small
    resnet50_clip visformer_tiny pvt_v2_b0 repvit_m0_9 mambaout_femto
""".split()  # noqa: SIM905 - a list of names is read in columns
HF = [
    f"{kind}:{option}"
    for kind in ("clip", "siglip", "dinov2", "dinov2_with_registers")
    for option in ("layer=-1", "layer=-2", "image_size=42")
]
_EVA = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
OPEN_CLIP = {
    "open_clip": {"layers": 3, "width": 24, "head_width": 12, "patch_size": 7, "image_size": 28, "mlp_ratio": 2.0},
    "open_clip_eva": {"image_size": 224, **_EVA},
    "open_clip_384": {"image_size": 384, **_EVA, "timm_model_name": "vit_tiny_patch16_384"},
}
DECODERS = """
    llama qwen2 qwen3 qwen3_moe mistral mixtral gemma gemma2 gemma3_text phi phi3 falcon gpt_neox gpt2 gptj
    codegen opt bloom mpt olmo2 starcoder2 stablelm cohere cohere2 granite glm4 smollm3 lfm2 mamba falcon_h1
    jamba qwen3_next rwkv recurrent_gemma deepseek_v3 persimmon nemotron ernie4_5 hunyuan_v1_dense exaone4
""".split()  # noqa: SIM905 - a list of names is read in columns
CHOICES = [*TIMM, *HF, *OPEN_CLIP, *DECODERS]
TEXTS = ["What is shown here? A red square. A green circle. Is it a dog? Yes. No. One, two, three, four, five."]


@dataclass
class Row:
    """An encoder or decoder. A cell is the largest difference and the layout, or why there is no export."""

    name: str
    shape: str
    cells: list[str]
    failed: bool = False


def prove(name: str, root: Path) -> Row:
    """Make and read back the exports of one encoder or decoder, in an empty folder."""
    try:
        return _prove_decoder(name, root) if name in DECODERS else _prove_encoder(name, root)
    except Exception as error:
        return Row(name, "not built", [_one_line(error)], failed=True)


def _prove_encoder(name: str, root: Path) -> Row:
    """`--full`, and the parts of a run that trained the encoder."""
    write_llm(root / "llm", TEXTS)
    vision = _write_encoder(name, root / "encoder")
    plain = {"vision": vision, "projector": {"kind": "mlp"}, "llm": {"path": str(root / "llm")}}
    cells = [
        _export(plain | {"trainable": ["projector"]}, root / "full", full=True),
        _export(plain | {"trainable": ["projector", "vision"]}, root / "parts", full=False),
    ]
    described = root / "full" / "shape.txt"
    shape = described.read_text() if described.is_file() else "not built"
    return Row(name, shape, *_judged(cells))


def _prove_decoder(name: str, root: Path) -> Row:
    """`--full`, the parts of a run that trained all of it with a padded vocabulary, and an adapter."""
    write_encoder(root / "clip")
    tokenizer = tiny_tokenizer(TEXTS)
    tokenizer.save_pretrained(root / "llm")
    model = toy_decoder(name, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=None)
    model.save_pretrained(root / "llm")
    vision = {"backend": "hf", "path": str(root / "clip"), "layer": -2}
    plain: dict[str, Any] = {"vision": vision, "projector": {"kind": "mlp"}, "llm": {"path": str(root / "llm")}}
    padded = {"path": str(root / "llm"), "pad_vocab_to_multiple_of": 64}
    cells = [
        _export(plain | {"trainable": ["projector"]}, root / "full", full=True),
        _export(plain | {"trainable": ["projector", "llm"], "llm": padded}, root / "parts", full=False),
        _export(plain | {"trainable": ["llm.lora", "projector"], "lora": {"rank": 4}}, root / "adapter", full=False),
    ]
    return Row(name, type(model).__name__, *_judged(cells))


def _export(model: dict[str, Any], run: Path, full: bool) -> str:
    """The export of a run with such a model: the difference that it was read back with, and its layout."""
    try:
        _write_run(run, ModelConfig.model_validate(model))
        found: list[float] = []
        with Overheard(found):
            export = export_module.export_run(run, full=full)
        layout = json.loads((export / "vlm.json").read_text())["layout"]
        return f"{found[0]:.0e}" + (f" {layout}" if full else "")
    except Exception as error:
        return f"FAILED {_one_line(error)}"
    finally:
        gc.collect()


class Overheard:
    """Keep the differences that exports are read back with."""

    def __init__(self, found: list[float]) -> None:
        self.found, self.check = found, export_module.check_readable

    def __enter__(self) -> None:
        def check(*given: Any) -> float:
            self.found.append(self.check(*given))
            return self.found[-1]

        export_module.check_readable = check

    def __exit__(self, *_: object) -> None:
        export_module.check_readable = self.check


def _write_run(run: Path, config: ModelConfig) -> None:
    """A run with one checkpoint, whose trained weights are all moved off their start."""
    built = build_model(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in trained_weights(built.model).items()}
    run.mkdir(parents=True)
    data = {"template": "chatml", "sources": [{"path": "records.json"}]}
    whole = {"output_dir": str(run), "init_from": None, "model": config.model_dump(mode="json"), "data": data}
    (run / "config.yaml").write_text(json.dumps(whole))  # JSON is YAML
    save_checkpoint(
        run, 1, lambda folder: save_file(tensors, folder / "weights.safetensors"),
        {"start": pin_start(config, None)}, keep_last=2,
    )  # fmt: skip
    vision = built.model.vision
    if vision is not None:
        (run / "shape.txt").write_text(f"{vision.image_size} px, {vision.num_patches} patches")


def _write_encoder(name: str, folder: Path) -> dict[str, Any]:
    """Files as the library itself writes them. Returns `model.vision`."""
    torch.manual_seed(0)
    if name in OPEN_CLIP:
        _write_open_clip(folder, OPEN_CLIP[name])
        return {"backend": "open_clip", "path": str(folder)}
    if name in HF:
        kind, _, option = name.partition(":")
        _write_hf(folder, {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(kind, kind))
        key, _, value = option.partition("=")
        return {"backend": "hf", "path": str(folder), key: int(value)}
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model(name, num_classes=0), folder, safe_serialization=True)
    return {"backend": "timm", "path": str(folder)}


def _write_hf(folder: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
        patch_size=7,
    )  # fmt: skip
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def _write_open_clip(folder: Path, vision: dict[str, Any]) -> None:
    import open_clip

    folder.mkdir(parents=True)
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    width = 192 if "timm_model_name" in vision else 16
    model = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}
    values = {"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    whole = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


def _judged(cells: list[str]) -> tuple[list[str], bool]:
    return cells, any(cell.startswith("FAILED") for cell in cells)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", " ")


def as_markdown(rows: Sequence[Row], seconds: float) -> str:
    """docs/exports.md."""
    import open_clip
    import timm
    import transformers

    encoders = [row for row in rows if row.name not in DECODERS]
    decoders = [row for row in rows if row.name in DECODERS]
    failed = [row for row in rows if row.failed]
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}, "
        f"open_clip {open_clip.__version__}"
    )
    lines = [
        _HEAD.format(
            versions=versions, seconds=seconds, encoders=len(encoders), decoders=len(decoders), failed=len(failed)
        )
    ]
    for title, group, columns in (
        ("Encoders", encoders, ("encoder", "shape", "full", "trained")),
        ("Decoders", decoders, ("type", "class", "full", "trained", "adapter")),
    ):
        lines += [f"## {title}", "", _line(*columns), "|---" * len(columns) + "|"]
        lines += [_line(f"`{row.name}`", row.shape, *row.cells) for row in group] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


_HEAD = """# Exports that were read back

Written by `python scripts/prove_exports.py`: exports of random models, each loaded again from its folder by
`vlm export` and asked what the model was asked that it was made of. {versions};
{seconds:.0f} s.

**{encoders} encoders and {decoders} decoders; {failed} with an export that is not read back.**

A number is the largest difference of image features and logits, relative to the largest value; the greedy reply is
the same in every line. Zero is equal to the bit; what is not is folded into other weights (LLaVA's layout) or summed
in another order.

- full: `vlm export --full`, and the layout that it took.
- trained: the parts of a run that trained projector and encoder, or projector and the whole decoder, whose vocabulary
  was padded to a multiple of 64.
- adapter: the parts of a run that trained projector and LoRA.

Encoders of timm have the size that is theirs; those of transformers and open_clip are of toy size. Decoders are some
of [models.md](models.md), with a tiny CLIP; the encoders' decoder is a tiny Llama.
"""


def prove_all(names: Sequence[str], tell: Callable[[str], None]) -> list[Row]:
    rows = []
    for name in names:
        root = Path(tempfile.mkdtemp())
        try:
            rows.append(prove(name, root))
        finally:
            shutil.rmtree(root, ignore_errors=True)
        tell(f"{name}: {rows[-1].shape}: {', '.join(rows[-1].cells)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="encoders and decoders; none: all")
    parser.add_argument("--out", default="docs/exports.md", help="where to write; - prints")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(CHOICES)):
        parser.error(f"not known: {', '.join(unknown)}; there are {', '.join(CHOICES)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    began = time.monotonic()
    rows = prove_all(arguments.names or CHOICES, lambda line: print(line, file=sys.stderr, flush=True))
    text = as_markdown(rows, time.monotonic() - began)
    if arguments.out == "-":
        print(text)
    else:
        Path(arguments.out).write_text(text, encoding="utf-8")
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
