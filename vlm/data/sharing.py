"""Records about one image stand beside each other, and the tokens they begin with alike stand once.

What precedes the first reply in every one of them, up to the end of the image, is their stem: system prompt, the user's
header and the placeholders. The first record of a group is whole; each other one follows without its stem, at the
positions where the stem ended, and the model lets it see the stem and itself (`vlm.models.segments`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np

from vlm.batch import IGNORE_INDEX, Example
from vlm.data.examples import Kept


def find_stem(example: Example, image_token_id: int | None) -> int:
    """Tokens up to the end of the example's images, where these stand together and before all that is supervised; or 0.

    >>> find_stem(Example([5, 9, 9, 6, 7], [-100, -100, -100, -100, 7], ("a.png",)), image_token_id=9)
    3
    """
    ids = example.input_ids
    if not example.images or image_token_id is None:
        return 0
    first, count = ids.index(image_token_id), ids.count(image_token_id)
    stem = first + count
    is_alone = ids[first:stem].count(image_token_id) == count
    if not is_alone or stem == len(ids) or example.labels[:stem].count(IGNORE_INDEX) != stem:
        return 0
    return stem


def stem_of(kept: Kept) -> int:
    """`find_stem` of an example as it is kept."""
    runs = kept.runs
    if not kept.images or len(runs.images) != 2 or runs.images[1] == runs.length:
        return 0
    stem = runs.images[1]
    return stem if not runs.learned or runs.learned[0] >= stem else 0


def find_pair_stem(example: Example) -> int:
    """Tokens that both branches of a preference begin with, before anything supervised. Its images are among them.

    >>> find_pair_stem(Example([5, 6, 7], [-100, -100, 7], rejected=Example([5, 6, 8], [-100, -100, 8])))
    2
    """
    chosen, rejected = example.branches
    both = zip(chosen.input_ids, chosen.labels, rejected.input_ids, rejected.labels, strict=False)
    stem = 0
    for one, label, other, its_label in both:
        if one != other or label != IGNORE_INDEX or its_label != IGNORE_INDEX:
            break
        stem += 1
    return stem


def stem_key(kept: Kept, stem: int, image_token_id: int | None) -> int:
    """Equal for examples with the same stem and the same images; 0 only where the stem is."""
    if not stem:
        return 0
    assert image_token_id is not None  # or there would be no stem
    first = kept.runs.images[0]
    state = _hash_stem((*kept.runs.kept[:first], image_token_id), stem - first).copy()
    for image in kept.images:
        state.update(hashlib.sha256(image if isinstance(image, bytes) else image.encode()).digest())
    return int.from_bytes(state.digest()[:8], signed=True) or 1


@lru_cache(maxsize=256)
def _hash_stem(ids: tuple[int, ...], count: int) -> hashlib._Hash:
    """Of ids whose last one is a placeholder and stands `count` times. Most records of a source have the same."""
    return hashlib.sha256(array("q", [*ids[:-1], *ids[-1:] * count]).tobytes())


def may_join(first: Example, other: Example, stem: int) -> bool:
    """Whether `other` begins as `first` does, with `stem` tokens, and shows the same images."""
    return first.images == other.images and first.input_ids[:stem] == other.input_ids[:stem]


def bring_together(order: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The same records, each after the first of its key; what comes first, and records without one, keep their order.

    A record that stands in the order several times, since its source has a weight, does so in as many groups.

    Args:
        order: record numbers, int [n].
        keys: `stem_key` of all records, indexed by record number.

    >>> bring_together(np.array([0, 1, 2, 3, 0]), np.array([7, 0, 7, 7])).tolist()
    [0, 2, 3, 1, 0]
    """
    key = keys[order]
    places = np.arange(len(order))
    groups = np.stack([np.where(key == 0, places, _earlier(order)), key], axis=1)
    _, first, group = np.unique(groups, axis=0, return_index=True, return_inverse=True)
    return order[np.argsort(first[group.reshape(-1)], kind="stable")]


def _earlier(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each.

    >>> _earlier(np.array([4, 5, 4, 4])).tolist()
    [0, 0, 1, 2]
    """
    by_value = np.argsort(values, kind="stable")
    ordered = values[by_value]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ranks = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    earlier = np.empty_like(ranks)
    earlier[by_value] = ranks
    return earlier


class Shares:
    """What `pack_in_windows` needs to know of stems.

    Args:
        keys: `stem_key` of all records, int64 [n].
        stems: `find_stem` of all records, `find_pair_stem` of preferences, int32 [n].
    """

    def __init__(self, keys: np.ndarray, stems: np.ndarray) -> None:
        self.keys = keys
        self.stems = stems

    @cached_property
    def firsts(self) -> np.ndarray:
        """The first record with the key of each, int64 [n]; -1 without a key. What decides which records stand
        together, wherever the images lie.

        >>> Shares(np.array([7, 0, 9, 7]), np.array([3, 0, 3, 3])).firsts.tolist()
        [0, -1, 2, 0]
        """
        _, first, key = np.unique(self.keys, return_index=True, return_inverse=True)
        return np.where(self.keys == 0, -1, first[key.reshape(-1)])

    @cached_property
    def within(self) -> np.ndarray:
        """Tokens that the branches of each record share with each other, int32 [n]: of preferences, which share with no
        other record."""
        return np.where(self.keys == 0, self.stems, 0)

    @cached_property
    def has_pairs(self) -> bool:
        return bool(self.within.any())

    def groups(
        self, part: np.ndarray, lengths: np.ndarray, num_images: np.ndarray, max_length: int
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Neighbours of one key that fit a row together.

        Args:
            part: record numbers, int [n], those of a key beside each other.
            lengths, num_images: of all records.

        Returns:
            the groups, in order; tokens of each; images of each.
        """
        groups: list[list[int]] = []
        tokens: list[int] = []
        images: list[int] = []
        for members in self._neighbours(part):
            stem = int(self.stems[members[0]])
            left = 0
            for number in members:
                tail = int(lengths[number]) - stem
                if groups and left >= tail and stem:
                    groups[-1].append(number)
                    tokens[-1] += tail
                    left -= tail
                else:
                    groups.append([number])
                    tokens.append(int(lengths[number]))
                    images.append(int(num_images[number]))
                    left = max_length - tokens[-1]
        return [np.array(group) for group in groups], np.array(tokens), np.array(images)

    def _neighbours(self, part: np.ndarray) -> Iterator[Sequence[int]]:
        for key, members in groupby(part.tolist(), key=lambda number: int(self.keys[number])):
            if key:
                yield list(members)
            else:
                yield from ([number] for number in members)
