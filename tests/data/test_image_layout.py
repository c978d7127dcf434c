"""How many tokens and tiles an image takes is one pure function, asked by data, model, chat and server alike."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiled_images import TiledSpec
from tokenizers_for_tests import byte_level_bpe

from vlm.batch import ImageSpec
from vlm.data.collate import Collator
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.images import image_layout, load_image, to_tiles, upright_size
from vlm.data.packing import pack
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import RecordError

SETTINGS = {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_tokens": 4}
SPECS = [ImageSpec(**SETTINGS), TiledSpec(**SETTINGS)]
KINDS = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
ORIENTATION = 0x0112


@KINDS
def test_the_layout_of_10_000_random_sizes_is_pure_and_within_the_image(spec: ImageSpec):
    draw = random.Random(0)
    for _ in range(10_000):
        width, height = (round(10 ** draw.uniform(0, 4)) for _ in range(2))
        layout = spec.layout(width, height)
        assert layout.num_tokens == 4 * len(layout.tiles) > 0
        assert all(0 <= a < c <= width and 0 <= b < d <= height for a, b, c, d in layout.tiles)


def images(folder: Path, count: int = 60) -> list[str]:
    """Of random sizes, some turned by EXIF."""
    draw, paths = random.Random(1), []
    for number in range(count):
        size = tuple(draw.choice((3, 9, 17, 40, 80)) for _ in range(2))
        exif = Image.Exif()
        exif[ORIENTATION] = draw.choice((1, 2, 3, 4, 5, 6, 7, 8))
        path = folder / f"{number}.{draw.choice(('png', 'jpg', 'webp', 'tiff'))}"
        Image.new("RGB", size, "red").save(path, exif=exif)
        paths.append(str(path))
    return paths


@KINDS
def test_header_pixels_placeholders_and_packed_rows_agree(spec: ImageSpec, tmp_path: Path):
    tokenizer = byte_level_bpe()
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    tokens = ConversationTokenizer(tokenizer, TEMPLATES["chatml"], image_token_id=image_id, tokens_per_image=spec)
    collate = Collator(spec, pad_token_id=0, max_pixels=10**6)
    examples, expected = [], []
    for path in images(tmp_path):
        opened = load_image(path)
        assert upright_size(path) == opened.size
        tiles = to_tiles(opened, spec)
        layout = image_layout(path, spec)
        assert tiles.shape == (len(layout.tiles), 3, 8, 8)
        talk = Conversation((Turn("user", (IMAGE, "\nWhat?")), Turn("assistant", ("Red.",))), (path,))
        examples.append(tokens(talk))
        expected.append(layout.num_tokens)
        assert examples[-1].input_ids.count(image_id) == layout.num_tokens
        assert tokens.prompt(Conversation(talk.turns[:1], (path,))).count(image_id) == layout.num_tokens
    lengths = torch.tensor([len(example.input_ids) for example in examples]).numpy()
    rows = pack(lengths, torch.ones(len(examples), dtype=torch.int16).numpy(), 200, 8)
    for row in rows:
        batch = collate([[examples[int(number)] for number in row]])
        assert batch.input_ids.shape[1] <= 200
        assert 4 * len(batch.pixel_values) == int((batch.input_ids == image_id).sum())
    assert len(set(expected)) == (1 if spec.kind == "square" else 3)


def test_an_image_whose_size_cannot_be_read_is_skipped_by_rule(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for path, rule in ((tmp_path / "a.png", "image_unreadable"), (tmp_path / "b.png", "image_missing")):
        assert image_layout(path, SPECS[0]).num_tokens == 4  # never opened where all images take as many
        with pytest.raises(RecordError) as caught:
            image_layout(path, SPECS[1])
        assert caught.value.rule == rule
