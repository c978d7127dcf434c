"""Log-likelihoods of candidate replies.

All candidates of a record stand in one row behind a single copy of its prompt: a token sees the prompt and its own
candidate, never another one, and its position goes on from the prompt's end. So the prompt, picture included, is
computed once per record instead of once per candidate: with 20 candidates of 10 tokens behind 64, a fifth of the
tokens.

Letters in shapes: B rows, L tokens, D LLM width, T tokens per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import IGNORE_INDEX
from vlm.data.images import load_image, to_pixels
from vlm.evaluation.tasks import Question
from vlm.export.load import LoadedModel
from vlm.models.decoders import find_decoder

MAX_TOKENS = {"cpu": 1024, "cuda": 16384}  # padded tokens per forward; a CPU is as fast at 512 and at 4096
# supervised positions whose logits exist at once; 128 stay in a CPU's caches: 2.5 times as fast there as 2048
CHUNK = 128
_ALONE = -1  # segment of padding: it sees itself only, as a row of a mask must not be empty


class PictureFeatures:
    """Projected features of pictures, each encoded once while `max_bytes` last.

    Pictures are asked for twice or more: for their own record, for the record that is shown them by mistake on
    purpose, and by other tasks.
    """

    def __init__(self, loaded: LoadedModel, max_bytes: int = 2 << 30, batch_size: int = 16) -> None:
        self._loaded = loaded
        self._left = max_bytes
        self._batch_size = batch_size
        self._kept: dict[str | bytes, Tensor] = {}

    def get(self, images: Sequence[str | bytes]) -> dict[str | bytes, Tensor]:
        """[T, D] for every picture.

        Raises:
            RecordError: a picture cannot be read.
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

    def _encode(self, images: list[str | bytes]) -> Tensor:
        loaded, spec = self._loaded, self._loaded.image_spec
        assert spec is not None
        pixels = torch.stack([to_pixels(load_image(image, background=spec.background), spec) for image in images])
        with torch.inference_mode(), loaded.autocast():
            return loaded.model.encode_images(pixels.to(loaded.device))


def score_candidates(
    loaded: LoadedModel,
    questions: Sequence[Question],
    pictures: PictureFeatures,
    shown: Callable[[Question], tuple[str | bytes, ...]] = lambda question: question.images,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Log-likelihood of every candidate reply, its end-of-reply token included: a sum over tokens, in nats.

    Args:
        pictures: where features come from.
        shown: which pictures a question is shown, as many as its own.
        max_tokens: padded tokens per forward; None takes what suits the device. A row that is longer stands alone.
        on_progress: called with the number of questions begun so far.

    Returns:
        per question, one number per candidate, in their order.
    """
    max_tokens = max_tokens or MAX_TOKENS.get(loaded.device.type, 1024)
    scores: list[list[float]] = [[0.0] * len(question.replies) for question in questions]
    begun: set[int] = set()
    for rows in _batches(_rows(questions, max_tokens, _takes_masks(loaded)), max_tokens):
        wanted = [image for row in rows for image in shown(questions[row.question])]
        features = pictures.get(wanted)
        spliced = [features[image] for image in wanted]
        sums = _forward(loaded, rows, torch.cat(spliced) if spliced else None)
        for row, values in zip(rows, sums, strict=True):
            for candidate, value in zip(row.candidates, values, strict=True):
                scores[row.question][candidate] = value
        begun |= {row.question for row in rows}
        on_progress(len(begun))
    return scores


@dataclass(frozen=True)
class _Row:
    question: int
    candidates: list[int]
    input_ids: list[int]
    position_ids: list[int]
    segments: list[int]  # 0 the prompt, k the k-th candidate of the row
    previous: list[int]  # the place whose hidden state predicts each token
    labels: list[int]


def _rows(questions: Sequence[Question], max_tokens: int, share_prompt: bool) -> list[_Row]:
    """Rows of at most max_tokens (unless one candidate alone is longer), longest first: memory runs out at once."""
    rows = []
    for number, question in enumerate(questions):
        group: list[int] = []
        length = start = len(question.prompt_ids)
        for candidate, reply in enumerate(question.replies):
            if group and (not share_prompt or length + len(reply) > max_tokens):
                rows.append(_row(number, question, group))
                group, length = [], start
            group.append(candidate)
            length += len(reply)
        rows.append(_row(number, question, group))
    return sorted(rows, key=lambda row: -len(row.input_ids))


def _row(number: int, question: Question, candidates: list[int]) -> _Row:
    prompt = len(question.prompt_ids)
    ids, positions, segments = list(question.prompt_ids), list(range(prompt)), [0] * prompt
    previous, labels = list(range(-1, prompt - 1)), [IGNORE_INDEX] * prompt
    for segment, candidate in enumerate(candidates, 1):
        reply = question.replies[candidate]
        first = len(ids)
        previous += [prompt - 1, *range(first, first + len(reply) - 1)]
        ids += reply
        positions += range(prompt, prompt + len(reply))
        segments += [segment] * len(reply)
        labels += question.reply_labels[candidate]
    return _Row(number, candidates, ids, positions, segments, previous, labels)


def _batches(rows: list[_Row], max_tokens: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:  # sorted: the first of a batch is its longest
        if batch and len(batch[0].input_ids) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _forward(loaded: LoadedModel, rows: list[_Row], features: Tensor | None) -> list[list[float]]:
    device = loaded.device
    length = max(len(row.input_ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], device=device)

    input_ids = padded([row.input_ids for row in rows], 0)
    segments = padded([row.segments for row in rows], _ALONE)
    positions = torch.tensor(
        [row.position_ids + list(range(len(row.input_ids), length)) for row in rows], device=device
    )
    with torch.inference_mode(), loaded.autocast():
        shared = any(len(row.candidates) > 1 for row in rows)
        mask = _tree_mask(segments, loaded.compute_dtype) if shared else None
        decoder = find_decoder(loaded.model.llm)
        hidden_states = decoder(
            inputs_embeds=loaded.model.embed(input_ids, features),
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        return _sum_by_candidate(loaded, rows, hidden_states)


def _tree_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L], 0 where a token sees another, the lowest number where not. Eager attention reads bools wrongly."""
    seeing, seen = segments.unsqueeze(2), segments.unsqueeze(1)
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = causal & ((seen == seeing) | ((seen == 0) & (seeing != _ALONE)))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def _sum_by_candidate(loaded: LoadedModel, rows: list[_Row], hidden_states: Tensor) -> list[list[float]]:
    counted = [
        (number, row.previous[place], label, row.segments[place] - 1)
        for number, row in enumerate(rows)
        for place, label in enumerate(row.labels)
        if label != IGNORE_INDEX
    ]
    row_of, place_of, targets, candidate_of = torch.tensor(counted, device=hidden_states.device).unbind(1)
    states = hidden_states[row_of, place_of]
    losses = torch.cat(
        [
            F.cross_entropy(
                loaded.model.logits(states[i : i + CHUNK]).float(), targets[i : i + CHUNK], reduction="none"
            )
            for i in range(0, len(states), CHUNK)
        ]
    )
    sums = torch.zeros(len(rows), max(len(row.candidates) for row in rows), dtype=torch.float64, device=losses.device)
    sums.index_put_((row_of, candidate_of), -losses.double(), accumulate=True)
    return [values[: len(row.candidates)] for row, values in zip(rows, sums.tolist(), strict=True)]


def _takes_masks(loaded: LoadedModel) -> bool:
    """Where not, each candidate gets a row: flash and flex attention take no mask of our own, a window would be lost in
    one, and a state that runs along the row does not read it."""
    config, packing = loaded.model.llm.config, loaded.model.packing
    has_window = getattr(config.get_text_config(decoder=True), "sliding_window", None) is not None
    is_attention_only = packing.by_positions and packing.longest is None and not has_window
    return is_attention_only and config._attn_implementation in ("sdpa", "eager")
