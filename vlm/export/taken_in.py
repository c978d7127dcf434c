"""Another program's VLM folder -> an export of ours, to talk to and to go on training from."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.artifacts.folder import replace_folder
from vlm.artifacts.foreign import Foreign, adapter_tensors, lora_config, read_foreign
from vlm.artifacts.layouts import ADAPTERS, LLM, TOWER, VISION_PART
from vlm.artifacts.parts import Trained, save_sharded
from vlm.artifacts.shards import check_shard_size
from vlm.compat import prepare
from vlm.data.config import DataConfig
from vlm.errors import ConfigError
from vlm.export.merge import TOKENIZER, merge_folder
from vlm.export.run import Written, finish_export, tell_export, write_trained
from vlm.inference.load import known_template
from vlm.logs import log
from vlm.models.config import LLMConfig, ModelConfig, VisionConfig
from vlm.models.projector_kinds import MLPProjectorConfig
from vlm.models.tokenizer_files import read_json
from vlm.models.trainable import part_of
from vlm.models.vision import build_vision, save_architecture
from vlm.models.weight_files import LazyTensors
from vlm.schema import PARTS

_PREPROCESSOR = "preprocessor_config.json"
_BLOCKS = "vision.trunk.model.encoder.layers."


def import_folder(
    folder: str | Path,
    out: str | Path,
    *,
    llm: str | None = None,
    vision: str | None = None,
    template: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Take a folder of `FOREIGN`'s layouts apart into the parts of an export, and read that back.

    What the folder holds whole becomes `OUT/llm` and `OUT/vision`, which are model folders of transformers; the others
    stay base models beside it, as of a run's export. An adapter stays one, so that it can go on training.

    Args:
        llm, vision: base models in place of those that the folder names, mostly on a hub.
        template: chat template, by name; None takes what the layout was mostly trained with.

    Returns:
        the export.

    Raises:
        CheckpointError: another layout, or one that our parts cannot express; a base model is missing or does not fit.
        ConfigError: a base model is named for a part that the folder brings; `out` cannot be written.
    """
    prepare()
    check_shard_size(max_shard_size)
    source, final = Path(folder), Path(out)
    found = read_foreign(source)
    data = {"template": known_template(template or found.template), "sources": [{"path": str(source)}]}
    with replace_folder(final) as temporary:
        config, brought = _parts(found, source, temporary, llm, vision, max_shard_size)
        tensors = {name: found.tensors[name] for name in found.tensors if part_of(name) not in brought}
        tensors = {name: tensor.float() if part_of(name) == "projector" else tensor for name, tensor in tensors.items()}
        if found.adapter is not None:
            tensors |= adapter_tensors(found.adapter)
        names = tuple(part for part in PARTS if part in {part_of(name) for name in tensors})
        config = config.model_copy(update={"trainable": names})
        origin = {"imported": f"{source.name} ({found.layout})"}
        trained = Trained(config, DataConfig.model_validate(data), tensors, names, origin, "first")
        written = _with_brought(write_trained(temporary, trained, max_shard_size, "auto"), brought, found, source)
        finish_export(temporary, final, written)
    tell_export(final, written.manifest, f"taken from {source}, {found.layout}, template {written.manifest.template}")
    for note in found.notes:
        log(f"{final}: {note}")
    log(_how_to_go_on(final, config, brought))
    return final


def _parts(
    found: Foreign, source: Path, target: Path, llm: str | None, vision: str | None, max_shard_size: str
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config of the model, and which of its base models were written into `target`."""
    brings_vision = found.vision_config is not None or found.vision_adapter is not None
    for flag, given, is_brought in (
        ("--llm", llm, found.text_config is not None),
        ("--vision", vision, found.vision_config is not None),
    ):
        if given is not None and is_brought:
            raise ConfigError(f"{flag} {given}: {source} ({found.layout}) brings its own. Leave the flag out")
    llm, vision = llm or found.llm, vision or found.vision
    if found.text_config is not None:
        _write_llm(found, source, target / LLM, max_shard_size)
        llm = str(target / LLM)
    layer = found.layer
    if found.vision_adapter is not None:
        _merge_encoder(found, _named(vision, "--vision", source), target / VISION_PART)
    elif found.vision_config is not None:
        _write_encoder(found, source, target / VISION_PART)
    if brings_vision:
        vision, layer = str(target / VISION_PART), _from_the_kept_end(found.layer)
    config = ModelConfig(
        vision=VisionConfig(
            backend=found.backend, path=_named(vision, "--vision", source), layer=layer, resize=found.resize,
            keep_class_token=found.keep_class_token, background=found.background,
        ),
        projector=found.projector,
        llm=LLMConfig(path=_named(llm, "--llm", source), pad_vocab_to_multiple_of=_padded_to(found, llm)),
        lora=None if found.adapter is None else lora_config(found.adapter),
    )  # fmt: skip
    brought = {LLM: found.text_config is not None, VISION_PART: brings_vision}
    return config, tuple(part for part, is_brought in brought.items() if is_brought)


def _from_the_kept_end(layer: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """The layers of an encoder that ends with the last of them.

    >>> _from_the_kept_end(-2), _from_the_kept_end((-2, -5))
    (-1, (-1, -4))
    """
    return -1 if isinstance(layer, int) else tuple(each - max(layer) - 1 for each in layer)


def _write_llm(found: Foreign, source: Path, target: Path, max_shard_size: str) -> None:
    """A language model's folder as transformers writes it."""
    assert found.text_config is not None
    tensors = found.tensors.only(name for name in found.tensors if part_of(name) == LLM)
    save_sharded(ADAPTERS[LLM].from_ours(tensors), target, max_shard_size)
    for name in (*TOKENIZER, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _write(target / "config.json", found.text_config)


def _write_encoder(found: Foreign, source: Path, target: Path) -> None:
    """An encoder's folder as transformers writes it, without blocks after the one whose output is taken."""
    assert found.vision_config is not None
    last = found.layer if isinstance(found.layer, int) else max(found.layer)
    kept = int(found.vision_config["num_hidden_layers"]) + last + 1
    names = [name for name in found.tensors if part_of(name) == VISION_PART and _block_of(name) < kept]
    settings = {**found.vision_config, "num_hidden_layers": kept}
    if not any(".head." in name for name in names):
        settings["vision_use_head"] = False  # SigLIP's, which LLaVA leaves out
    save_sharded(TOWER.from_ours(found.tensors.only(names)), target, "5GB")
    _write(target / "config.json", settings)
    if found.normalisation is not None:
        mean, std = found.normalisation
        _write(target / _PREPROCESSOR, {"image_mean": list(mean), "image_std": list(std)})
    elif (source / _PREPROCESSOR).is_file():
        shutil.copyfile(source / _PREPROCESSOR, target / _PREPROCESSOR)


def _merge_encoder(found: Foreign, base: str, target: Path) -> None:
    """The base encoder with its LoRA added, as `_write_encoder` writes one."""
    assert found.vision_adapter is not None
    with tempfile.TemporaryDirectory() as scratch:
        merged = merge_folder(base, [found.vision_adapter], Path(scratch) / "encoder")
        config = VisionConfig(backend="hf", path=str(merged), layer=found.layer)
        encoder = build_vision(config)
        target.mkdir()
        save_architecture(encoder, config, target)
        state: Mapping[str, Tensor] = encoder.trunk.model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        save_sharded(LazyTensors(shapes, state.__getitem__), target, "5GB")
        _write(target / _PREPROCESSOR, {"image_mean": list(encoder.mean), "image_std": list(encoder.std)})


def _with_brought(written: Written, brought: tuple[str, ...], found: Foreign, source: Path) -> Written:
    """The manifest of a folder that holds some of its own base models."""
    manifest = written.manifest
    changes: dict[str, Any] = {}
    if LLM in brought:
        changes["llm"] = manifest.model.llm.model_copy(update={"path": LLM})
    if VISION_PART in brought and manifest.model.vision is not None:
        changes["vision"] = manifest.model.vision.model_copy(update={"path": VISION_PART})
    included = tuple(part for part in PARTS if part in (*manifest.included, *brought))
    names = {
        LLM: source.name if LLM in brought else manifest.model.llm.path,
        VISION_PART: source.name if found.vision_config is not None else found.vision or manifest.origin["vision"],
    }
    return replace(
        written,
        notes=[*written.notes, *found.notes],
        manifest=replace(
            manifest,
            model=manifest.model.model_copy(update=changes),
            included=included,
            base={part: hashes for part, hashes in manifest.base.items() if part not in brought},
            full={LLM, VISION_PART} <= set(included),
            origin={**manifest.origin, **names},
        ),
    )


def _how_to_go_on(final: Path, model: ModelConfig, brought: tuple[str, ...]) -> str:
    """What the config of the next training says.

    Args:
        model: with the paths of its base models, where they are not `brought`.
    """
    vision = model.vision
    assert vision is not None
    places = {part: final / part if part in brought else None for part in (LLM, VISION_PART)}
    keeps = ", keep_class_token: true" if vision.keep_class_token else ""
    projector = model.projector
    layer = vision.layer if isinstance(vision.layer, int) else list(vision.layer)
    depth = f", depth: {projector.depth}" if isinstance(projector, MLPProjectorConfig) else ""
    multiple = model.llm.pad_vocab_to_multiple_of
    padded = f", pad_vocab_to_multiple_of: {multiple}" if multiple else ""
    lines = [
        "to go on training, in a config:",
        f"  init_from: {final}",
        "  model:",
        f"    vision: {{backend: {vision.backend}, path: {places[VISION_PART] or vision.path}, layer: {layer}, "
        f"resize: {vision.resize}, background: {list(vision.background)}{keeps}}}",
        f"    projector: {{kind: {projector.kind}{depth}}}",
        f"    llm: {{path: {places[LLM] or model.llm.path}{padded}}}",
    ]
    if model.lora is not None:
        lora = model.lora
        kinds = "".join(f", {key}: true" for key in ("rslora", "dora") if getattr(lora, key))
        kinds += f", modules_to_save: [{', '.join(lora.modules_to_save)}]" if lora.modules_to_save else ""
        targets = ", ".join(lora.targets)
        lines.append(f"    lora: {{rank: {lora.rank}, alpha: {lora.alpha}, targets: [{targets}]{kinds}}}")
    return "\n".join(lines)


def _padded_to(found: Foreign, llm: str) -> int | None:
    """prismatic pads the vocabulary to a multiple of 64."""
    rows = [shape[0] for name, shape in found.tensors.shapes.items() if name.endswith("embed_tokens.weight")]
    vocabulary = read_json(Path(llm) / "config.json").get("vocab_size") if llm else None
    return (
        64 if found.text_config is None and rows and vocabulary and rows[0] > vocabulary and not rows[0] % 64 else None
    )


def _named(path: str, flag: str, source: Path) -> str:
    if not path:
        raise ConfigError(f"{source} does not say which base model it was trained beside: name it with {flag} FOLDER")
    return path


def _block_of(name: str) -> int:
    """
    >>> _block_of("vision.trunk.model.encoder.layers.11.mlp.fc1.bias"), _block_of("vision.trunk.model.norm.bias")
    (11, -1)
    """
    return int(name.removeprefix(_BLOCKS).partition(".")[0]) if name.startswith(_BLOCKS) else -1


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
