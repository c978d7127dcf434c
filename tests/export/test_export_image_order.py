"""Clients put the words first. An export knows how its data had them, and every face of it asks so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_export import model_config, write_image, write_run

from vlm.apps.session import ChatSession
from vlm.artifacts.manifest import NAME, read_manifest
from vlm.errors import CheckpointError
from vlm.export.run import export_run
from vlm.inference.load import LoadedModel, load
from vlm.inference.messages import to_conversation
from vlm.train.checkpoint import read_info


def export_counted(run: Path, orders: dict[str, int] | None, out: Path | None = None) -> Path:
    """Export a run whose checkpoint says how its data had the images; None: one of an earlier version."""

    def info(checkpoint: Path) -> dict[str, Any]:
        return read_info(checkpoint) | ({} if orders is None else {"image_orders": orders})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.artifacts.parts.read_info", info)
        return export_run(run, out)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("order")
    write_run(root / "run", model_config(root))
    write_image(root / "cat.png")
    export_counted(root / "run", {"first": 990, "mixed": 4})
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedModel:
    return load(root / "run" / "export", device="cpu", precision="fp32")


def question(root: Path, *order: str) -> list[dict[str, Any]]:
    parts = {"words": {"type": "text", "text": "What is this?"},
             "image": {"type": "image", "image": str(root / "cat.png")}}  # fmt: skip
    return [{"role": "user", "content": [parts[name] for name in order]}]


def prompt(loaded: LoadedModel, messages: list[dict[str, Any]]) -> list[int]:
    return loaded.conversation_tokenizer.prompt(to_conversation(messages, (), loaded.template))


@pytest.mark.slow
def test_words_before_the_image_are_asked_as_the_data_had_them(root: Path, loaded: LoadedModel):
    assert read_manifest(root / "run" / "export").image_order == "first"
    image_first, words_first = question(root, "image", "words"), question(root, "words", "image")
    assert prompt(loaded, words_first) == prompt(loaded, image_first)
    assert loaded.chat(words_first, max_new_tokens=8) == loaded.chat(image_first, max_new_tokens=8)
    session = ChatSession(loaded)
    session.add_image(root / "cat.png")
    assert loaded.conversation_tokenizer.prompt(session.conversation("What is this?")) == prompt(loaded, image_first)


def test_keep_leaves_them_as_they_come_and_it_matters(root: Path, loaded: LoadedModel):
    kept = load(root / "run" / "export", device="cpu", precision="fp32", image_order="keep")
    image_first, words_first = question(root, "image", "words"), question(root, "words", "image")
    assert prompt(kept, image_first) == prompt(loaded, image_first)
    assert prompt(kept, words_first) != prompt(kept, image_first)
    assert kept.chat(words_first, max_new_tokens=8) != loaded.chat(words_first, max_new_tokens=8)


def test_the_exported_template_does_the_same_for_other_programs(root: Path, loaded: LoadedModel):
    def written(*kinds: str) -> str:
        parts = [{"type": "image"} if kind == "image" else {"type": "text", "text": "What is this?"} for kind in kinds]
        return str(loaded.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))

    assert written("words", "image") == written("image", "words")
    assert "user\n<image>\nWhat is this?" in written("words", "image")


def test_data_with_the_words_first_is_asked_with_the_words_first(root: Path, tmp_path: Path):
    folder = export_counted(root / "run", {"last": 12}, tmp_path / "export")
    last = load(folder, device="cpu", precision="fp32")
    session = ChatSession(last)
    session.add_image(root / "cat.png")
    text = last.conversation_tokenizer.text(last.conversation_tokenizer.prompt(session.conversation("What is this?")))
    assert "user\nWhat is this?\n<image>" in text


@pytest.mark.parametrize("orders", [None, {}, {"first": 5, "last": 5}, {"mixed": 3}])
def test_mixed_data_and_runs_that_did_not_count_leave_the_order_to_the_client(
    root: Path, tmp_path: Path, orders: dict[str, int] | None
):
    folder = export_counted(root / "run", orders, tmp_path / "export")
    assert read_manifest(folder).image_order == "keep"


@pytest.mark.slow
def test_a_stage_without_images_and_words_has_the_order_of_the_one_before(root: Path, tmp_path: Path):
    write_run(tmp_path / "next", model_config(root), init_from=root / "run" / "export")
    for orders, expected in (({}, "first"), ({"last": 9}, "last")):
        folder = export_counted(tmp_path / "next", orders, tmp_path / f"export-{expected}")
        assert read_manifest(folder).image_order == expected


def test_exports_of_earlier_versions_load_and_an_edited_order_is_named(root: Path, tmp_path: Path):
    values = json.loads((root / "run" / "export" / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({key: value for key, value in values.items() if key != "image_order"}))
    assert read_manifest(tmp_path).image_order == "keep"
    (tmp_path / NAME).write_text(json.dumps(values | {"image_order": "middle"}))
    with pytest.raises(CheckpointError, match="image_order is 'middle'; known: first, last, keep"):
        read_manifest(tmp_path)


def test_the_model_card_says_where_the_images_stood(root: Path):
    card = (root / "run" / "export" / "README.md").read_text(encoding="utf-8")
    assert "| images in the data | before the words in 990 turns, between words in 4 turns |" in card
