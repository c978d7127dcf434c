"""A config with all it names: whether the paths are there, and what training will say of the models' folders.

Every command asks this before anything heavy is imported; neither torch nor transformers is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm.config import RunConfig, load_config, raise_problems, read_source, unused_settings
from vlm.config_paths import Problem, encoder_keys, missing_inputs, run_problems
from vlm.errors import CheckpointError, ConfigError
from vlm.launch import launched_rank, local_rank
from vlm.layered_yaml import dotted
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.folder import (
    Vocabulary,
    config_json,
    misfit,
    read_vocabulary,
    why_beyond_embedding,
    why_no_tokenizer,
    why_no_weights,
)
from vlm.models.native import is_native_decoder, why_not_a_decoder, why_not_native

READS = ("weights", "tokenizer")  # of models' folders, besides config.json

_LLM, _TEMPLATE = ("model", "llm", "path"), ("data", "template")


def load_checked(
    config: str,
    options: Sequence[str] = (),
    sections: Collection[str] = (),
    reads: Collection[str] = READS,
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> RunConfig:
    """Read a config and see whether its paths exist, as `vlm validate` does, before anything heavy is imported.

    Args:
        sections: check only paths below these keys, e.g. ("model", "data"), where a command reads no others.
        reads: of models' folders besides config.json, "weights" and "tokenizer".
        change: what the command makes of the config before its paths are looked at.

    Raises:
        ConfigError: names every problem with its file and line.
    """
    try:
        checked = change(load_config(config, options))
    except ConfigError as error:
        raise error.on_every_rank() from None
    source = read_source(config, options)
    found = [(key, text) for key, text in config_problems(checked, reads) if not sections or key[0] in sections]
    problems = [f"{source.place(key)}: {dotted(key)}: {text}" for key, text in found]
    if problems:
        try:
            raise_problems(config, problems, f"Relative paths are looked for in {Path.cwd()}")
        except ConfigError as error:
            if launched_rank() == local_rank() or local_rank() > 0:  # each machine has its own disk: one there speaks
                error.on_every_rank()
            raise
    return checked


def config_problems(config: RunConfig, reads: Collection[str] = READS) -> list[Problem]:
    """Paths that do not exist or hold no model. Of models, text files are opened, weights not.

    Args:
        reads: what the command will read of models' folders besides config.json.
    """
    missing = [(key, text) for key, text in missing_inputs(config) if "weights" in reads or key[-1] != "pretrained"]
    return [*missing, *model_problems(config, reads), *run_problems(config)]


def model_problems(config: RunConfig, reads: Collection[str] = READS) -> list[Problem]:
    """Why the folders here that transformers will read would be refused.

    Args:
        reads: what the command reads of them; `vlm plan` needs config.json alone.
    """
    problems = [*_language_model(config, reads), *_encoder(config, reads)]
    if not problems and "tokenizer" in reads and Path(config.model.llm.path).is_dir():
        problems += _vocabulary(config)
    return problems


def run_notes(config: RunConfig) -> list[str]:
    """What training will warn of, for a config without problems."""
    notes = [*unused_settings(config), *blind_reference(config)]
    folder = Path(config.model.llm.path)
    if folder.is_dir() and (vocabulary := _read_vocabulary(folder)) is not None:
        from vlm.data.template import TEMPLATES, control_words, warn_of_split  # late: jinja2 takes 40 ms

        template = TEMPLATES.get(config.data.template)
        if template is not None:
            words = [word for word in control_words(template) if word not in vocabulary.ids]
            notes += [text for text in (warn_of_split(template, words),) if text]
    for encoder in config.model.vision.encoders if config.model.vision is not None else ():
        kind = VISION_BACKENDS[encoder.backend]
        notes += [f"model.vision.path {encoder.path}: {note}" for note in kind.notes(encoder)]
    return notes


def blind_reference(config: RunConfig) -> Iterator[str]:
    """A warning where a run is held to a model that sees no image."""
    if config.objective.needs_reference and config.begins_blind:
        yield (
            f"objective.kind {config.objective.kind} compares with the model that the run starts from, whose projector "
            "is random without init_from, so that it sees no image; name the export of a run that trained it"
        )


def _language_model(config: RunConfig, reads: Collection[str]) -> Iterator[Problem]:
    folder = Path(config.model.llm.path)
    if not folder.exists():
        return
    if (problem := misfit(folder, is_encoder=False)) is not None:
        yield _LLM, problem
        return
    settings = config_json(folder)
    trusts = config.model.trust_remote_code
    if reason := why_not_native(settings, trusts):
        yield _LLM, f"{folder}: {reason}"
    elif not (is_native_decoder(settings["model_type"]) or "auto_map" in settings):
        yield _LLM, f"{folder}: {why_not_a_decoder(settings['model_type'])}"
    if "weights" in reads and (reason := why_no_weights(folder)):
        yield _LLM, f"{folder}: cannot load its weights: {reason}"
    if "tokenizer" in reads and (reason := why_no_tokenizer(folder, trusts)):
        yield _LLM, f"{folder}: cannot load its tokenizer: {reason}"


def _encoder(config: RunConfig, reads: Collection[str]) -> Iterator[Problem]:
    if config.model.vision is None:
        return
    for key, encoder in zip(encoder_keys(config), config.model.vision.encoders, strict=True):
        for problem in VISION_BACKENDS[encoder.backend].problems(encoder, reads):
            yield (*key, "path"), problem


def _vocabulary(config: RunConfig) -> Iterator[Problem]:
    """Of the template's words and the embedding's rows, against the tokenizer's tokens."""
    folder = Path(config.model.llm.path)
    try:
        vocabulary = _read_vocabulary(folder)
    except CheckpointError as error:
        yield _LLM, str(error)
        return
    if vocabulary is None:
        return
    if reason := _why_template_does_not_fit(config.data.template, vocabulary):
        yield _TEMPLATE, reason
        return
    rows = _num_rows(config_json(folder), config.model.llm.pad_vocab_to_multiple_of)
    used = {*vocabulary.named.values(), *_control_words(config.data.template)}
    if rows is not None:
        ids = [(token, vocabulary.ids.get(token)) for token in used]
        if reason := why_beyond_embedding(vocabulary.size, ids, rows):
            yield _LLM, f"{folder}: {reason}"


def _read_vocabulary(folder: Path) -> Vocabulary | None:
    """Once for problems and notes: 0.13 s for 150,000 tokens."""
    files = [file for file in sorted(folder.glob("*")) if "token" in file.name or "chat" in file.name]
    return _read_once(folder, tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=1)
def _read_once(folder: Path, state: tuple[tuple[str, int, int], ...]) -> Vocabulary | None:
    return read_vocabulary(folder)


def _why_template_does_not_fit(name: str, vocabulary: Vocabulary) -> str | None:
    from vlm.data.template import NO_CHAT_TEMPLATE, TEMPLATES, why_no_end

    if name == "tokenizer":
        return None if vocabulary.has_chat_template else NO_CHAT_TEMPLATE
    return why_no_end(TEMPLATES[name], not vocabulary.has_no_end, vocabulary.ids.__contains__)


def _control_words(name: str) -> list[str]:
    from vlm.data.template import TEMPLATES, control_words

    return control_words(TEMPLATES[name]) if name in TEMPLATES else []


def _num_rows(settings: dict[str, Any], multiple: int | None) -> int | None:
    """Of the embedding, as training will have grown it; None where config.json does not say."""
    text = settings.get("text_config")
    rows = (text if isinstance(text, dict) else settings).get("vocab_size")
    return rows if multiple is None or not isinstance(rows, int) else -(-rows // multiple) * multiple
