"""Words before the image: prompts are brought into the order that was trained on, here and in the exported template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level_bpe

from vlm.data.build import build_reader
from vlm.data.config import DataConfig
from vlm.data.conversation import IMAGE, Conversation, Part, Turn
from vlm.data.image_order import arrange_images, learned_order, order_of
from vlm.data.image_order_counts import count_image_orders
from vlm.data.template import BOS, EOS, TEMPLATES, Piece
from vlm.data.tokenize import ConversationTokenizer
from vlm.inference.messages import to_conversation


def test_images_go_before_the_words_and_keep_their_own_order():
    assert arrange_images(("What is this?", IMAGE), "first") == (IMAGE, "\nWhat is this?")
    assert arrange_images(("First", IMAGE, "then", IMAGE, "Compare."), "first") == (
        IMAGE, IMAGE, "\nFirst", "\nthen", "\nCompare.",
    )  # fmt: skip
    assert arrange_images(("\nOn a line", " of its own", IMAGE), "first") == (IMAGE, "\nOn a line", " of its own")


def test_images_go_behind_the_words_of_data_that_has_them_there():
    assert arrange_images((IMAGE, "\nWhat is this?"), "last") == ("What is this?", "\n", IMAGE)
    assert arrange_images(("One\n", IMAGE, "two"), "last") == ("One\n", "\ntwo", "\n", IMAGE)
    assert arrange_images((IMAGE, "What?\n"), "last") == ("What?\n", IMAGE)
    assert arrange_images(("What?", IMAGE), "last") == ("What?", "\n", IMAGE)


@pytest.mark.parametrize("order", ["first", "last", "keep"])
def test_turns_in_order_without_words_or_without_images_stay(order: Any):
    kept: list[tuple[Part, ...]] = [(IMAGE, IMAGE), ("Hi",), (), ("a", "b")]
    kept += {"first": [(IMAGE, "What?")], "last": [("What?\n", IMAGE)], "keep": [("a", IMAGE, "b")]}[order]
    for parts in kept:
        assert arrange_images(parts, order) == parts


def test_the_order_of_a_turn_is_told_by_its_words():
    assert order_of((IMAGE, IMAGE, "\nWhat?")) == "first"
    assert order_of(("\n", IMAGE, "\nWhat?")) == "first"  # blanks are no words
    assert order_of(("What?", IMAGE)) == "last"
    assert order_of((IMAGE, "a", IMAGE)) == order_of(("a", IMAGE, "b")) == "mixed"
    assert order_of((IMAGE,)) is order_of(("a",)) is None


TEXTS = st.sampled_from(["a", "\nb", "c\n", " d", "\n"])
MESSAGE = st.lists(st.one_of(st.just(None), TEXTS), min_size=1, max_size=5)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(message=MESSAGE, order=st.sampled_from(["first", "last", "keep"]), name=st.sampled_from(["chatml", "llama3"]))
def test_the_exported_template_puts_them_where_our_prompts_have_them(message: list[Any], order: Any, name: str):
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in message]
    template = replace(TEMPLATES[name], image_order=order)
    asked = to_conversation([{"role": "user", "content": parts}], [b""] * message.count(None), template)
    pieces = template.render(asked, add_generation_prompt=True)
    ours = "".join(piece.text if isinstance(piece, Piece) else "<image>" for piece in pieces)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = template.jinja("<s>", "</s>", tokenizer_adds_bos=False)
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False,
                                           add_generation_prompt=True)  # fmt: skip
    assert theirs == ours.replace(BOS, "<s>").replace(EOS, "</s>")


def test_words_first_become_the_tokens_of_training():
    tokenizer = byte_level_bpe()
    image = tokenizer.convert_tokens_to_ids("<image>")
    template = replace(TEMPLATES["chatml"], image_order="first")
    tokens = ConversationTokenizer(tokenizer, template, image_token_id=image, tokens_per_image=2)
    trained = tokens.prompt(Conversation((Turn("user", (IMAGE, "\nWhat is this?")),), ("a.png",)))
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    asked = to_conversation([{"role": "user", "content": parts}], ["a.png"], template)
    assert tokens.prompt(asked) == trained


def test_an_order_is_not_part_of_what_a_run_is_known_by():
    """Scans and checkpoints from before there were orders are known again."""
    assert repr(replace(TEMPLATES["chatml"], image_order="first")) == repr(TEMPLATES["chatml"])


def reader(tmp_path: Path, questions: list[str], template: str = "chatml") -> Any:
    records = [
        {"image": "a.png", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}]}
        for text in questions
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "a.png").write_bytes(b"")
    source = {"path": str(tmp_path / "records.json"), "images": str(tmp_path)}
    config = DataConfig.model_validate({"sources": [source], "template": template, "cache": str(tmp_path / "cache")})
    tokenizer = byte_level_bpe()
    image = tokenizer.convert_tokens_to_ids("<image>")
    tokens = ConversationTokenizer(tokenizer, TEMPLATES[template], image_token_id=image, tokens_per_image=2)
    return build_reader(config, config.sources, tokens)


def test_orders_are_counted_in_the_data(tmp_path: Path):
    questions = ["<image>\nWhat?", "What? <image>", "Is <image> it?", "<image>", "no mark"]
    counts = count_image_orders(reader(tmp_path, questions), np.arange(5))
    assert counts == {"first": 2, "last": 1, "mixed": 1}  # the image of "no mark" is put first when it is read
    assert count_image_orders(reader(tmp_path, questions), np.array([0, 3])) == {"first": 1}


def test_large_data_is_counted_in_evenly_spaced_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.data.image_order_counts.MOST_COUNTED", 4)
    questions = ["<image>\nWhat?"] * 6 + ["What? <image>"] * 2
    assert count_image_orders(reader(tmp_path, questions), np.arange(8)) == {"first": 3, "last": 1}


def test_words_that_the_template_leaves_out_do_not_count(tmp_path: Path):
    template = replace(TEMPLATES["chatml"], only_images_of_user=True)
    found = reader(tmp_path, ["<image>\nWhat?"])
    monkey = replace(found, tokenizer=type("Tokens", (), {"template": template})())
    assert count_image_orders(monkey, np.arange(1)) == {}


def test_an_order_is_learned_where_nearly_all_turns_have_it():
    assert learned_order({"first": 99, "last": 1}) == "first"
    assert learned_order({"first": 98, "last": 2}) == "keep"
    assert learned_order({"last": 5}) == "last"
    assert learned_order({"mixed": 5}) == learned_order({}) == "keep"
