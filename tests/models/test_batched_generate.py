"""Replies written in one batch are the replies that are written alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import changed, write_llm

from vlm.generation import slot_cache
from vlm.generation.batched import BatchedGenerator, EndReason, NotFinite, Reply, SharedPrompt
from vlm.generation.generate import GenerationSettings, generate
from vlm.generation.sampling import NewToken, SamplingSettings
from vlm.generation.slot_cache import BatchedDecoder, bytes_per_token
from vlm.models.build import build_model
from vlm.models.config import LLMConfig, ModelConfig
from vlm.models.llm import load_llm
from vlm.models.row_decoders import RowByRowDecoder
from vlm.models.vlm import VisionLanguageModel

FAMILIES: dict[str, tuple[str, dict[str, Any], type]] = {
    "llama": ("llama", {}, BatchedDecoder),
    "llama eager": ("llama", {"attn_implementation": "eager"}, BatchedDecoder),
    "mistral": ("mistral", {"sliding_window": None}, BatchedDecoder),
    "mistral window": ("mistral", {"sliding_window": 5}, BatchedDecoder),
    "qwen2": ("qwen2", {}, BatchedDecoder),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
        BatchedDecoder,
    ),
    "qwen3": ("qwen3", {}, BatchedDecoder),
    "internlm3": ("internlm3", {}, BatchedDecoder),
    "gemma2": ("gemma2", {"sliding_window": 5}, RowByRowDecoder),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        RowByRowDecoder,
    ),
}
IMAGES = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(7))


class Written:
    """A reply and what became of it."""

    def __init__(self, prompt: list[int], count: int = 12, pixels: Any = None, stop: Any = (), **settings: Any) -> None:
        self.tokens: list[NewToken] = []
        self.end: EndReason | Exception | None = None
        self.stop_after: int | None = None
        self.reply = Reply(prompt, pixels, count, stop, SamplingSettings(**settings), self._token, self._ended)

    def _ended(self, end: EndReason | Exception) -> None:
        assert self.end is None
        self.end = end

    def _token(self, token: NewToken) -> bool:
        self.tokens.append(token)
        return self.stop_after is None or len(self.tokens) < self.stop_after

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 1 to 20 tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(2, 28) for _ in range(rng.randint(1, 20))] for _ in range(count)]


def write(generator: BatchedGenerator, *written: Written) -> None:
    for one in written:
        generator.add(one.reply)
    while generator.step():
        pass


def greedy(model: VisionLanguageModel, prompt: list[int], count: int = 12, pixels: Any = None) -> list[int]:
    return generate(model, prompt, pixels, [], GenerationSettings(max_new_tokens=count))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def with_images(config: ModelConfig) -> VisionLanguageModel:
    return build_model(changed(config, trainable=["projector"])).model


def load(folder: Path, family: str, **changes: Any) -> VisionLanguageModel:
    attention = changes.pop("attn_implementation", "auto")
    path = write_llm(folder / "llm", family, **changes)
    return VisionLanguageModel(load_llm(LLMConfig(path=str(path), attention=attention), torch.float32))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_writes_what_each_reply_alone_would_be(tmp_path: Path, name: str):
    family, changes, decoder = FAMILIES[name]
    model = load(tmp_path, family, **changes)
    generator = BatchedGenerator(model, max_running=3, prefill_tokens=7)  # prompts are read in pieces
    assert isinstance(generator.decoder, decoder)
    written = [Written(prompt) for prompt in prompts(7)]
    write(generator, *written)
    expected = [greedy(model, one.reply.input_ids) for one in written]
    assert [one.ids for one in written] == expected
    assert len({tuple(ids) for ids in expected}) > 3
    assert {one.end for one in written} == {"length"}


def test_images_stay_with_their_reply(with_images: VisionLanguageModel):
    prompt = [2, *[28] * 16, 3, 4]
    written = [Written(prompt, pixels=IMAGES[n : n + 1]) for n in range(6)]
    write(BatchedGenerator(with_images, max_running=4), *written)
    expected = [greedy(with_images, prompt, pixels=IMAGES[n : n + 1]) for n in range(6)]
    assert [one.ids for one in written] == expected
    assert len({tuple(ids) for ids in expected}) > 1


@pytest.mark.slow
def test_replies_join_and_leave_while_others_are_written(llama: VisionLanguageModel):
    """At random: some are added late, some end early, some are cancelled. None is disturbed."""
    rng = random.Random(3)
    generator = BatchedGenerator(llama, max_running=4, max_tokens=64 * 4, prefill_tokens=5)
    written = [Written(prompt, count=rng.choice([5, 20, 30, 90])) for prompt in prompts(19, seed=5)]
    written.insert(0, Written([2, 3], count=240))  # almost the whole budget
    late = list(written)
    cancelled = set()
    while late or generator.running or generator.waiting:
        for _ in range(min(rng.randint(0, 2), len(late))):
            generator.add(late.pop(0).reply)
        if rng.random() < 0.03 and (generator.running or generator.waiting):
            victim = rng.choice([*generator.running, *generator.waiting])
            cancelled.add(id(victim))
            generator.cancel(victim)
        generator.step()
        cache = generator.decoder.cache
        assert generator.num_reserved == cache.num_slots * cache.num_cells <= 64 * 4
        assert all(kept.shape[0] * kept.shape[2] <= 64 * 4 for layer in cache._layers for kept in layer)
    assert 2 < len(cancelled) < 12
    for one in written:
        expected = greedy(llama, one.reply.input_ids, one.reply.max_new_tokens)
        if id(one.reply) in cancelled:
            assert one.end == "cancelled"
            assert one.ids == expected[: len(one.ids)]
        else:
            assert (one.end, one.ids) == ("length", expected)


def test_the_budget_bounds_the_rectangle(llama: VisionLanguageModel):
    generator = BatchedGenerator(llama, max_running=8, max_tokens=300)
    short, long = [Written([2, 3], count=4) for _ in range(4)], Written([2] * 100, count=20)  # reserve 64 and 128
    for one in (*short[:2], long, *short[2:]):
        generator.add(one.reply)
    generator.step()
    assert len(generator.running) == 2  # with the long one it would be 3 x 128
    while generator.step():
        assert generator.num_reserved <= 300
        assert generator.decoder.cache.num_slots * generator.decoder.cache.num_cells <= 300
    assert {one.end for one in (*short, long)} == {"length"}
    with pytest.raises(ValueError, match="a reply of up to 320 tokens, the budget is 256"):
        generator.add(Written([2] * 300, count=1).reply)


def test_a_long_reply_does_not_leave_its_length_to_those_that_follow(llama: VisionLanguageModel):
    generator = BatchedGenerator(llama, max_running=8, max_tokens=1024)
    long, short = Written([2] * 900, count=2), [Written(prompt, count=9) for prompt in prompts(8)]
    generator.add(long.reply)
    for one in short:
        generator.add(one.reply)
    reserved = set()
    while generator.step():
        reserved.add(generator.num_reserved)
    assert reserved == {15 * 64, 8 * 64}  # 900 + 2 tokens for one; then 64 for each of eight
    assert [one.ids for one in short] == [greedy(llama, one.reply.input_ids, 9) for one in short]


def test_no_memory_for_one_more_reply_ends_only_that_one(llama: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    generator = BatchedGenerator(llama)
    running, joining, later = Written([2, 3]), Written([4, 5, 6]), Written([4, 5, 6])
    generator.add(running.reply)
    generator.step()
    calls = 0

    def fail(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no memory")
        return cells(*arguments)

    cells = slot_cache._cells
    monkeypatch.setattr(slot_cache, "_cells", fail)
    generator.add(joining.reply)
    generator.step()
    assert isinstance(joining.end, torch.OutOfMemoryError)
    assert {kept.shape[0] for layer in generator.decoder.cache._layers for kept in layer} == {1}
    write(generator, later)
    assert calls > 2
    assert (running.ids, running.end) == (greedy(llama, [2, 3]), "length")
    assert later.ids == greedy(llama, [4, 5, 6])


@pytest.mark.parametrize("max_running", [1, 2, 4])
def test_a_prompt_that_replies_share_is_read_once(with_images: VisionLanguageModel, max_running: int):
    """Its images too. Copying needs a reply that still runs, so one at a time must read it again."""
    calls = {"encode_images": 0, "prefill": 0}

    def count(owner: Any, name: str) -> None:
        called = getattr(owner, name)

        def counting(*arguments: Any) -> Any:
            calls[name] += 1
            return called(*arguments)

        setattr(owner, name, counting)

    prompt = [2, *[28] * 16, 3, 4]
    alone = Written(prompt, pixels=IMAGES[:1], temperature=1.5, seed=3)
    write(BatchedGenerator(with_images), alone)
    generator = BatchedGenerator(with_images, max_running=max_running)
    count(with_images, "encode_images")
    count(generator.decoder, "prefill")
    shared = SharedPrompt()
    choices = [Written(prompt, 6 + 3 * n, IMAGES[:1], temperature=1.5, seed=n) for n in range(4)]
    for one in choices:
        one.reply.shared = shared
    write(generator, Written([2, 3], 2), *choices)
    assert calls == {"encode_images": 1, "prefill": 1 + (4 if max_running == 1 else 1)}
    assert choices[3].ids[:12] == alone.ids
    assert [len(one.ids) for one in choices] == [6, 9, 12, 15]
    assert len({tuple(one.ids[:6]) for one in choices}) == 4
    assert shared.embeddings is shared.logits is None


def test_memory_is_freed_when_nothing_is_left(llama: VisionLanguageModel):
    generator = BatchedGenerator(llama)
    write(generator, Written([2, 3]))
    assert generator.decoder.cache._layers == []


def test_a_stop_token_or_the_listener_ends_a_reply(llama: VisionLanguageModel):
    free = greedy(llama, [2, 3, 4])
    by_token, by_listener = Written([2, 3, 4], stop=[free[3]]), Written([2, 3, 4])
    by_listener.stop_after = 2
    write(BatchedGenerator(llama), by_token, by_listener)
    assert (by_token.ids, by_token.end) == (free[: free.index(free[3])], "stop")
    assert (by_listener.ids, by_listener.end) == (free[:2], "stop")


def test_a_seed_decides_a_reply_whatever_is_written_beside_it(llama: VisionLanguageModel):
    def sample(seed: int, companions: int) -> list[int]:
        one = Written([2, 3, 4], temperature=2.0, top_p=0.95, seed=seed)
        others = [Written(prompt, temperature=1.5, seed=n) for n, prompt in enumerate(prompts(companions))]
        write(BatchedGenerator(llama, max_running=8), *others[:2], one, *others[2:])
        return one.ids

    alone = sample(5, 0)
    assert sample(5, 3) == sample(5, 7) == alone
    assert sample(6, 3) != alone


def test_logprobs_are_those_of_the_model(llama: VisionLanguageModel):
    one = Written([2, 3, 4], count=3, temperature=5.0, seed=1, num_logprobs=2)
    write(BatchedGenerator(llama), Written([5, 6]), one)
    ids = [2, 3, 4]
    for token in one.tokens:
        hidden = llama(torch.tensor([ids]), torch.arange(len(ids))[None])
        expected = llama.logits(hidden[0, -1]).log_softmax(-1).detach()
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [i for i, _ in token.likeliest] == expected.topk(2).indices.tolist()
        ids.append(token.id)


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_an_error_in_one_reply_is_its_own(llama: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, slot: int):
    written = [Written(prompt) for prompt in prompts(3)]
    generator = BatchedGenerator(llama)
    decode = generator._decode

    def fail(replies: list[Reply], first_slot: int) -> torch.Tensor:
        if written[slot].reply in replies and len(written[slot].ids) == 4:
            raise RuntimeError("broken row")
        return decode(replies, first_slot)

    monkeypatch.setattr(generator, "_decode", fail)
    write(generator, *written)
    for n, one in enumerate(written):
        expected = greedy(llama, one.reply.input_ids)
        assert one.ids == (expected[:4] if n == slot else expected)
        assert isinstance(one.end, RuntimeError) == (n == slot)


def test_images_that_do_not_fit_the_prompt_end_only_their_reply(with_images: VisionLanguageModel):
    bad, good = Written([2, 28, 3], pixels=IMAGES[:1]), Written([2, 3])
    write(BatchedGenerator(with_images), bad, good)
    assert isinstance(bad.end, ValueError)
    assert good.ids == greedy(with_images, [2, 3])


def test_no_number_of_one_reply_reaches_the_next_in_its_slot(llama: VisionLanguageModel):
    """0 * NaN is NaN: cells behind a row's end must hold numbers."""
    generator = BatchedGenerator(llama, max_running=2)
    other, broken, after = Written([2, 3], count=40), Written([2] * 30), Written([5, 6])
    for one in (other, broken, after):
        generator.add(one.reply)
    generator.step()
    for layer in generator.decoder.cache._layers:
        for kept in layer:
            kept[1] = torch.nan
    while generator.step():
        pass
    assert isinstance(broken.end, NotFinite)
    assert other.ids == greedy(llama, [2, 3], 40)
    assert after.ids == greedy(llama, [5, 6])


def test_fail_all_ends_everything_and_starts_anew(llama: VisionLanguageModel):
    generator = BatchedGenerator(llama, max_running=1)
    running, waiting, later = (Written([2, 3]) for _ in range(3))
    generator.add(running.reply)
    generator.add(waiting.reply)
    generator.step()
    generator.fail_all(RuntimeError("all"))
    assert [str(one.end) for one in (running, waiting)] == ["all", "all"]
    write(generator, later)
    assert later.ids == greedy(llama, [2, 3])


def test_bytes_per_token_is_what_the_cache_takes(llama: VisionLanguageModel):
    generator = BatchedGenerator(llama)
    generator.add(Written([2, 3], count=60).reply)
    generator.step()
    cache = generator.decoder.cache
    taken = sum(kept.numel() * kept.itemsize for layer in cache._layers for kept in layer)
    assert taken == cache.num_slots * cache.num_cells * bytes_per_token(llama)
