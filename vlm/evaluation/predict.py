"""Log-likelihoods of candidate replies.

All candidates behind one prompt and its images stand in one row, as a tree: the prompt once, then every beginning
that candidates share once, and no token that nothing follows. A token sees its ancestors only, and its position is
its depth. So the prompt is computed once instead of once per candidate, and "A cat." and "A dog." share their "A".
Whether that gives the numbers of each candidate alone is tried on the model itself first: layers with a window, a state
or distances of their own read no tree. Where it does not, each candidate has a row.

Letters in shapes: B rows, L tokens, D LLM width, T tokens per image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX
from vlm.data.images import load_image, to_tiles
from vlm.evaluation.questions import Question
from vlm.inference.load import LoadedModel
from vlm.logs import log
from vlm.models.decoders import find_decoder
from vlm.models.varlen import VARLEN

MAX_TOKENS = {"cpu": 1024, "cuda": 16384}  # padded tokens per forward; a CPU is as fast at 512 and at 4096
# supervised positions whose logits exist at once; 128 stay in a CPU's caches: 2.5 times as fast there as 2048
CHUNK = 128
_ROOT = -1  # parent of a row's first token
# Nats per token by which a candidate's score may differ between a row of several and one alone. Worst seen on toy
# decoders: 1e-6 in float32, 0.009 in bfloat16; a window of 12 that was lost made 1.9.
_BOUND = {torch.float32: 1e-3}


class FeatureCache:
    """Projected features of images, each encoded once while `max_bytes` last.

    Images are asked for twice or more: for their own record, for the record that is shown them by mistake on
    purpose, and by other tasks.
    """

    def __init__(self, loaded: LoadedModel, max_bytes: int = 2 << 30, batch_size: int = 16) -> None:
        self._loaded = loaded
        self._left = max_bytes
        self._batch_size = batch_size
        self._kept: dict[str | bytes, Tensor] = {}

    def get(self, images: Sequence[str | bytes]) -> dict[str | bytes, Tensor]:
        """[tokens, D] for every image.

        Raises:
            RecordError: an image cannot be read.
        """
        found = {image: self._kept[image] for image in images if image in self._kept}
        missing = [image for image in dict.fromkeys(images) if image not in found]
        for start in range(0, len(missing), self._batch_size):
            chunk = missing[start : start + self._batch_size]
            for image, features in zip(chunk, self._encode(chunk), strict=True):
                found[image] = features
                if self._left > 0:
                    self._left -= features.numel() * features.element_size()
                    self._kept[image] = features
        return found

    def _encode(self, images: list[str | bytes]) -> list[Tensor]:
        """Of each image, [tiles * T, D]."""
        loaded, spec = self._loaded, self._loaded.image_spec
        assert spec is not None
        pixels = [to_tiles(load_image(image, background=spec.background), spec) for image in images]
        with torch.no_grad(), loaded.autocast():
            parts = torch.cat(pixels).split(self._batch_size)
            tiles = torch.cat([loaded.model.encode_images(part.to(loaded.device)) for part in parts])
        return [each.flatten(0, 1) for each in tiles.split([len(each) for each in pixels])]


PictureFeatures = FeatureCache  # its name in earlier versions


def score_candidates(
    loaded: LoadedModel,
    questions: Sequence[Question],
    cache: FeatureCache,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Log-likelihood of every candidate reply, its end-of-reply token included: a sum over tokens, in nats.

    What several questions ask alike (prompt, images, reply) is computed once.

    Args:
        cache: where features come from.
        max_tokens: padded tokens per forward; None takes what suits the device. A row that is longer stands alone.
        on_progress: called with the number of questions begun so far.

    Returns:
        per question, one number per candidate, in their order.
    """
    max_tokens = max_tokens or MAX_TOKENS.get(loaded.device.type, 1024)
    prompts, places = _merge(questions)
    scorer = _Scorer(loaded, prompts, cache)
    scores = [[0.0] * len(prompt.replies) for prompt in prompts]
    begun: set[int] = set()
    for rows in _batches(scorer.choose_rows(max_tokens), max_tokens):
        for row, values in zip(rows, scorer.score(rows), strict=True):
            for reply, value in zip(row.replies, values, strict=True):
                scores[row.prompt][reply] = value
        begun |= {row.prompt for row in rows}
        on_progress(sum(prompts[number].num_questions for number in begun))
    return [[scores[prompt][reply] for reply in replies] for prompt, replies in places]


@dataclass
class _Prompt:
    """A prompt with its images, and every reply to it that a question offers."""

    ids: list[int]
    images: tuple[str | bytes, ...]
    replies: list[tuple[tuple[int, ...], tuple[int, ...]]]  # token ids and labels, each pair once
    num_questions: int = 0


def _merge(questions: Sequence[Question]) -> tuple[list[_Prompt], list[tuple[int, list[int]]]]:
    """The different prompts; and for every question which prompt, and which of its replies, are its own."""
    prompts: dict[Hashable, tuple[int, _Prompt]] = {}
    places = []
    for question in questions:
        key = (tuple(question.prompt_ids), question.images)
        number, prompt = prompts.setdefault(key, (len(prompts), _Prompt(question.prompt_ids, question.images, [])))
        prompt.num_questions += 1
        known = {reply: place for place, reply in enumerate(prompt.replies)}
        replies = zip(map(tuple, question.replies), map(tuple, question.reply_labels), strict=True)
        places.append((number, [known.setdefault(reply, len(known)) for reply in replies]))
        prompt.replies = list(known)
    return [prompt for _, prompt in prompts.values()], places


@dataclass
class _Row:
    """A prompt and some replies to it as a tree. `targets` are what counts: (place that predicts, token, reply)."""

    prompt: int
    replies: list[int]
    input_ids: list[int]
    position_ids: list[int]
    parents: list[int]  # the place before each token; always an earlier one
    prompt_end: int  # place of the prompt's last token
    targets: list[tuple[int, int, int]]


def _rows(prompts: Sequence[_Prompt], max_tokens: int, share_prompt: bool) -> list[_Row]:
    """Rows of at most max_tokens (unless one reply alone is longer), longest first: memory runs out at once."""
    rows = []
    for number, prompt in enumerate(prompts):
        row, places = _start_row(number, prompt.ids)
        for reply, (ids, labels) in enumerate(prompt.replies):
            if row.replies and (not share_prompt or len(row.input_ids) + len(ids) > max_tokens):
                rows.append(row)
                row, places = _start_row(number, prompt.ids)
            _add_reply(row, places, reply, ids, labels)
        rows.append(row)
    return sorted(rows, key=lambda row: -len(row.input_ids))


def _start_row(number: int, ids: list[int]) -> tuple[_Row, dict[tuple[int, int], int]]:
    """A row with the prompt alone, and where its tree goes on: (place, token that follows) -> that token's place."""
    positions = list(range(len(ids)))
    return _Row(number, [], list(ids), positions, [place - 1 for place in positions], len(ids) - 1, []), {}


def _add_reply(
    row: _Row, places: dict[tuple[int, int], int], reply: int, ids: Sequence[int], labels: Sequence[int]
) -> None:
    before = row.prompt_end
    for number, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label != IGNORE_INDEX:
            row.targets.append((before, label, len(row.replies)))
        if number == len(ids) - 1:
            break  # nothing follows, so its hidden state predicts nothing
        if (before, token) not in places:
            places[before, token] = len(row.input_ids)
            row.input_ids.append(token)
            row.position_ids.append(row.position_ids[before] + 1)
            row.parents.append(before)
        before = places[before, token]
    row.replies.append(reply)


def _batches(rows: list[_Row], max_tokens: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:  # sorted: the first of a batch is its longest
        if batch and len(batch[0].input_ids) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Scorer:
    """Scores rows of some prompts."""

    loaded: LoadedModel
    prompts: list[_Prompt]
    cache: FeatureCache

    def score(self, rows: list[_Row]) -> list[list[float]]:
        """Log-likelihood of every reply of every row."""
        images = [image for row in rows for image in self.prompts[row.prompt].images]
        features = self.cache.get(images)
        spliced = [features[image] for image in images]
        return _forward(self.loaded, rows, torch.cat(spliced) if spliced else None)

    def choose_rows(self, max_tokens: int) -> list[_Row]:
        """Rows of several candidates if that is proven right, else of one each."""
        shared = _rows(self.prompts, max_tokens, share_prompt=True)
        several = [row for row in shared if len(row.replies) > 1]
        if not several:
            return shared
        if _takes_masks(self.loaded) and self._is_right(several):
            return shared
        log("candidates of one prompt are scored one by one: this model gives other numbers when they share it")
        return _rows(self.prompts, max_tokens, share_prompt=False)

    def _is_right(self, rows: list[_Row]) -> bool:
        """Compare some candidates of the longest row, and of the deepest, with what each gets alone.

        A window or a limit of any layer shows in these first.
        """
        longest = max(rows, key=lambda row: len(row.input_ids))
        deepest = max(rows, key=lambda row: max(row.position_ids))
        limit = self.loaded.model.packing.longest  # beyond it, rows of one batch change each other's rotations
        if limit is not None and max(deepest.position_ids) >= limit:
            return False
        return all(self._agrees(row) for row in ([longest] if longest is deepest else [longest, deepest]))

    def _agrees(self, row: _Row) -> bool:
        places = sorted({0, len(row.replies) // 2, len(row.replies) - 1})
        prompt = self.prompts[row.prompt]
        alone = []
        for reply in (row.replies[place] for place in places):
            single, tree = _start_row(row.prompt, prompt.ids)
            _add_reply(single, tree, reply, *prompt.replies[reply])
            alone.append(single)
        try:
            together = self.score([row])[0]
            expected = [values[0] for values in self.score(alone)]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
            return False  # classes differ in how they refuse such a mask
        bound = _BOUND.get(self.loaded.compute_dtype, 0.05)
        return all(
            abs(together[place] - value) <= bound * max(1, len(single.targets))
            for place, value, single in zip(places, expected, alone, strict=True)
        )


def _forward(loaded: LoadedModel, rows: list[_Row], features: Tensor | None) -> list[list[float]]:
    """Log-likelihoods of each row's replies. features: [tokens, D] of all their images, in order."""
    length = max(len(row.input_ids) for row in rows)
    shared = any(len(row.replies) > 1 for row in rows)
    input_ids = torch.tensor([row.input_ids + [0] * (length - len(row.input_ids)) for row in rows])
    # Padding counts on where nothing sees it, which saves a mask. Else it is the padding that ends a row of a batch.
    packing = loaded.model.packing
    counts_on = shared or (packing.by_positions and packing.longest is None)
    positions = [row.position_ids + [place * counts_on for place in range(len(row.input_ids), length)] for row in rows]
    position_ids = torch.tensor(positions, device=loaded.device)
    with torch.no_grad(), loaded.autocast():
        embeddings = loaded.model.embed(input_ids.to(loaded.device), features)
        if not shared:
            return _sum_by_reply(loaded, rows, loaded.model.decode(embeddings, position_ids))
        hidden_states = find_decoder(loaded.model.llm)(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=_tree_mask(rows, length, loaded.compute_dtype).to(loaded.device),
            use_cache=False,
        ).last_hidden_state
        return _sum_by_reply(loaded, rows, hidden_states)


def _tree_mask(rows: list[_Row], length: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L], 0 where a token sees another, the lowest number where not. Eager attention reads bools wrongly.

    Padding sees itself, as a row of a mask must not be empty.
    """
    allowed = np.tile(np.eye(length, dtype=bool), (len(rows), 1, 1))
    for sees, row in zip(allowed, rows, strict=True):
        for place, parent in enumerate(row.parents):
            if parent != _ROOT:
                sees[place] |= sees[parent]
    mask = torch.zeros(allowed.shape, dtype=dtype)
    return mask.masked_fill(~torch.from_numpy(allowed), torch.finfo(dtype).min).unsqueeze(1)


def _sum_by_reply(loaded: LoadedModel, rows: list[_Row], hidden_states: Tensor) -> list[list[float]]:
    """[B, L, D] -> log-likelihoods of each row's replies.

    Logits are made once per place that predicts something, however many tokens are asked of it.
    """
    asked = [(number, *target) for number, row in enumerate(rows) for target in row.targets]
    row_of, place_of, tokens, reply_of = torch.tensor(asked, device=hidden_states.device).unbind(1)
    places, index = torch.unique(row_of * hidden_states.shape[1] + place_of, return_inverse=True)
    states = hidden_states.flatten(0, 1)[places]
    likelihoods = torch.zeros(len(asked), dtype=torch.float64, device=states.device)
    for start in range(0, len(states), CHUNK):
        logs = loaded.model.logits(states[start : start + CHUNK]).float().log_softmax(-1)
        here = (index >= start) & (index < start + CHUNK)
        likelihoods[here] = logs[index[here] - start, tokens[here]].double()
    sums = torch.zeros(len(rows), max(len(row.replies) for row in rows), dtype=torch.float64, device=states.device)
    sums.index_put_((row_of, reply_of), likelihoods, accumulate=True)
    return [values[: len(row.replies)] for row, values in zip(rows, sums.tolist(), strict=True)]


def _takes_masks(loaded: LoadedModel) -> bool:
    """Flash and flex attention take no mask of our own."""
    return loaded.model.llm.config._attn_implementation in (VARLEN, "sdpa", "eager")
