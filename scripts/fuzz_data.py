"""Wrong records and hostile pictures among good ones: the run ends, each skip is named, nothing unread is learned.

    python scripts/fuzz_data.py --folder /tmp/fuzz --seed 0

Writes a source of good and mutated records and of records with hostile pictures, reads all of it as training does
(scan, packing, one epoch of batches) and looks for what should not be there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.mutate import Maker, write_hostile_picture
from PIL import Image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vlm.batch import Example
    from vlm.data.tokenize import ConversationTokenizer

NUM_IMAGES = 8
_WORD = re.compile(r"\b[wx]\d+z\b")
_SURE_MARKS = re.compile(
    r"<\|(?:image|video|audio|vision)\w*\|>|<ImageHere>|<image_placeholder>|<IMG_CONTEXT>|\[IMG\]|<im_patch>"
)
_BOOKKEEPING = ("id",)


@dataclass
class Outcome:
    """What became of the records."""

    num_records: int = 0
    num_learned: int = 0
    by_rule: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def write_source(folder: Path, seed: int, num_good: int, num_mutated: int, num_pictures: int) -> Path:
    """Write records.jsonl and images/ into a new folder. Returns the file."""
    images = folder / "images"
    images.mkdir(parents=True)
    names = [f"good{number}.png" for number in range(NUM_IMAGES)]
    for number, name in enumerate(names):
        Image.new("RGB", (12, 12), (20 * number, 99, 200)).save(images / name)
    maker = Maker(seed, names)
    lines = [json.dumps(maker.good()).encode() for _ in range(num_good)]
    lines += [maker.mutated() for _ in range(num_mutated)]
    for number in range(num_pictures):
        name = f"hostile{number}.{maker.rng.choice(['png', 'jpg', 'gif', 'webp', 'tif'])}"
        write_hostile_picture(maker.rng, images / name)
        lines.append(json.dumps({"image": name, "caption": f"A {maker.word()}."}).encode())
    random.Random(seed).shuffle(lines)
    path = folder / "records.jsonl"
    path.write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines) + b"\n")
    return path


def read_source(path: Path, tokenizer: PreTrainedTokenizerFast) -> Outcome:
    """Read everything as training does, and judge it."""
    from vlm.batch import ImageSpec
    from vlm.data.build import build_data
    from vlm.data.config import DataConfig, SourceConfig
    from vlm.errors import RecordError

    spec = ImageSpec(size=14, mean=(0.5,) * 3, std=(0.5,) * 3, num_tokens=2)
    source = SourceConfig(path=str(path), images=str(path.parent / "images"))
    config = DataConfig(sources=(source,), cache=str(path.parent / "cache"), max_skipped_share=1.0, max_length=512)
    token = tokenizer.convert_tokens_to_ids("<image>")
    data = build_data(config, tokenizer, spec, token, seed=0, global_batch_size=4, micro_batch_size=4)
    reader = data.train.order.scan.reader
    outcome = Outcome(num_records=len(reader))
    raw = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    readable: dict[str, int] = {}
    for number in range(len(reader)):
        try:
            example = reader.read(number)
        except RecordError as error:
            outcome.by_rule[error.rule] += 1
            if not error.rule or not error.message or not error.where:
                outcome.problems.append(f"{number}: a skip without a name: {error!r}")
            continue
        readable[example.where] = number
        outcome.problems += [
            f"{example.where}: {problem}"
            for problem in judge(json.loads(raw[number]), example, data.conversation_tokenizer)
        ]
    learned = _one_epoch(data, outcome)
    outcome.num_learned = len(learned)
    outcome.problems += [f"{where}: in a batch, though it cannot be read" for where in learned - readable.keys()]
    if len(learned) + sum(outcome.by_rule.values()) != len(reader):
        outcome.problems.append(f"{len(learned)} learned and {outcome.by_rule.total()} skipped of {len(reader)}")
    return outcome


def _one_epoch(data: Any, outcome: Outcome) -> set[str]:
    """Where the records stand that one epoch of batches holds; those whose pictures fail there are counted."""
    learned: set[str] = set()
    for number in range(data.train.steps_in_epoch(0) * data.train.microbatches_per_step):
        batch = data.train.microbatch(number)
        learned |= set(batch.where)
        for skip in batch.skipped:
            outcome.by_rule[skip.rule] += 1
            if not (skip.rule and skip.where and skip.message):
                outcome.problems.append(f"a skip without a name: {skip}")
        if batch.pixel_values is not None and not batch.pixel_values.isfinite().all():
            outcome.problems.append(f"{batch.where}: pixels that are not finite")
    return learned


def judge(record: dict[str, Any], example: Example, tokenizer: ConversationTokenizer) -> list[str]:
    """What is wrong with an example: words that are lost without a word, learned ones that must not be, marks."""
    ids = [token for token in example.input_ids if token != tokenizer.image_token_id]
    text = tokenizer.text(ids)
    learned = set(_WORD.findall(tokenizer.text([label for label in example.labels if label >= 0])))
    problems = [f"{word} is learned" for word in learned if word.startswith("x")]
    named = " ".join(example.unread)
    told = set(re.split(r"[ .\[\]]+", " ".join(example.unread)))
    for keys, value in _leaves(record):
        key = keys[-1]
        if not isinstance(value, str) or key in _BOOKKEEPING or told & set(keys):
            continue
        lost = [word for word in _WORD.findall(value) if word not in text]
        problems += [f"{word} under {key} is lost in silence" for word in lost]
        is_shown = any(isinstance(image, bytes) or Path(image).name in value for image in example.images)
        if re.search(r"\.(?:png|jpg|gif|webp|tif|mp4|wav)$", value) and not is_shown:
            problems.append(f"{value[:40]!r} under {key} is lost in silence")
    left = [mark for mark in _SURE_MARKS.findall(text) if mark not in named]
    problems += [f"{mark} is read as words" for mark in left]
    return problems


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(keys above, value) of everything that is no list or object."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*keys, key))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item, keys)]
    return [(keys, value)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and ChatML's words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    words = ["<|im_start|>", "<image>"]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cache/fuzz"), help="made anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--good", type=int, default=1000)
    parser.add_argument("--mutated", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=500)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    started = time.monotonic()
    path = write_source(given.folder, given.seed, given.good, given.mutated, given.pictures)
    outcome = read_source(path, byte_tokenizer())
    print(f"{outcome.num_records} records, {outcome.num_learned} learned, in {time.monotonic() - started:.0f} s")
    for rule, count in outcome.by_rule.most_common():
        print(f"  {rule:22} {count:5}")
    for problem in outcome.problems[:40]:
        print(problem)
    raise SystemExit(f"{len(outcome.problems)} problems" if outcome.problems else 0)


if __name__ == "__main__":
    main()
