"""Log-likelihoods of a tiny model: against one forward per candidate, and end to end where the image decides."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from tiny_export import model_config, write_image, write_run
from toy_decoders import toy_decoder
from walk import registered

from vlm.artifacts.evidence import figures_table
from vlm.batch import IGNORE_INDEX
from vlm.config import RunConfig
from vlm.data.images import load_image, to_pixels
from vlm.errors import ConfigError, DataError
from vlm.evaluation import predict
from vlm.evaluation.config import EvaluationConfig
from vlm.evaluation.metrics import Figure
from vlm.evaluation.predict import FeatureCache, _merge, _Scorer, score_candidates
from vlm.evaluation.questions import Question
from vlm.evaluation.report import evaluate_run, run_tasks
from vlm.evaluation.task_kinds import TASKS, ChoiceTask, LossTask, RankingTask
from vlm.export.run import export_run
from vlm.inference.load import LoadedModel, load
from vlm.models.vlm import VisionLanguageModel

COLORS = ["red", "green", "blue", "yellow"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    write_run(root / "run", model_config(root))
    export_run(root / "run")
    for number in range(6):
        write_image(root / f"{number}.png", seed=number)
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedModel:
    return load(root / "run" / "export", device="cpu", precision="fp32")


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def choice_records(count: int = 6) -> list[dict[str, Any]]:
    return [
        {"image": f"{n}.png", "prompt": "What color?" * (1 + n % 3), "choices": COLORS, "answer": COLORS[n % 3]}
        for n in range(count)
    ]


def read(root: Path, kind: str, records: list[dict[str, Any]], loaded: LoadedModel, **extra: Any) -> list[Question]:
    path = write_records(root / f"{kind}.json", records)
    return TASKS[kind](name=kind, path=path, **extra).questions(loaded.conversation_tokenizer, root / "cache")


def one_forward_per_candidate(loaded: LoadedModel, question: Question) -> list[float]:
    """The definition: log-softmax at each reply token of one plain row, summed."""
    assert loaded.image_spec is not None
    pixels = torch.stack([to_pixels(load_image(image), loaded.image_spec) for image in question.images])
    sums = []
    for reply, labels in zip(question.replies, question.reply_labels, strict=True):
        ids = question.prompt_ids + reply
        with torch.no_grad():
            hidden = loaded.model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0), pixels)
            log_probabilities = loaded.model.logits(hidden)[0].double().log_softmax(-1)
        start = len(question.prompt_ids)
        sums.append(
            sum(
                log_probabilities[start + place - 1, label].item()
                for place, label in enumerate(labels)
                if label != IGNORE_INDEX
            )
        )
    return sums


@pytest.mark.parametrize("max_tokens", [4096, 90, 1])
def test_sharing_the_prompt_gives_the_log_likelihoods_of_one_forward_per_candidate(
    root: Path, loaded: LoadedModel, max_tokens: int
):
    """max_tokens 90 splits the candidates of a record among rows; 1 puts each in a row of its own."""
    questions = read(root, "choice", choice_records(), loaded)
    found = score_candidates(loaded, questions, FeatureCache(loaded), max_tokens=max_tokens)
    expected = [one_forward_per_candidate(loaded, question) for question in questions]
    # worst difference seen: 7.6e-6, of sums from -47 to -16
    assert torch.tensor(found).sub(torch.tensor(expected)).abs().max().item() < 1e-4
    assert len({round(score, 3) for scores in found for score in scores}) > 12


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SHARES = {
    "qwen2": ({}, True),
    "opt": ({}, True),
    "bloom": ({}, False),  # distances along the row
    "gpt_neo": ({}, False),  # every other block attends within a window of its own
    "mistral": ({"sliding_window": 8}, False),
    "gemma3_text": ({"sliding_window": 8}, False),
    "cohere2": ({"sliding_window": 8}, False),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, False),
    "mamba": ({}, False),
    "llama": ({"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, False),
}


def toy(kind: str, **changes: Any) -> LoadedModel:
    cpu, nothing = torch.device("cpu"), dict.fromkeys(("tokenizer", "conversation_tokenizer", "image_spec", "system"))
    model = VisionLanguageModel(toy_decoder(kind, **changes)).eval()
    return LoadedModel(
        model=model, image_token_id=None, config=None, device=cpu, compute_dtype=torch.float32, **nothing
    )  # type: ignore[arg-type]


def toy_question(prompt: int, replies: int) -> Question:
    """Of random words; the prompt has so many tokens, and each of the replies five."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (count,), generator=draw).tolist() for count in (prompt, *[5] * replies)]
    return Question(ids[0], ids[1:], ids[1:], 0, "", (), "")


@pytest.mark.parametrize("kind", SHARES)
def test_candidates_share_a_prompt_only_where_this_model_gives_each_what_it_gets_alone(kind: str):
    changes, shares = SHARES[kind]
    loaded, question = toy(kind, **changes), toy_question(prompt=20, replies=4)
    shorter = toy_question(prompt=9, replies=3)
    found = score_candidates(loaded, [question, shorter], FeatureCache(loaded))
    for each, scores in ((question, found[0]), (shorter, found[1])):
        for reply, score in zip(each.replies, scores, strict=True):
            ids = torch.tensor([each.prompt_ids + reply[:-1]])  # the last token predicts nothing
            logits = loaded.model.llm(input_ids=ids, use_cache=False).logits[0]
            logs = logits.double().log_softmax(-1)[len(each.prompt_ids) - 1 :]
            own = sum(logs[place, token].item() for place, token in enumerate(reply))
            assert score == pytest.approx(own, abs=1e-3)  # worst seen: 3.1e-6
    rows = _Scorer(loaded, _merge([question, shorter])[0], FeatureCache(loaded)).choose_rows(1024)
    assert len(rows) == (2 if shares else 7)


def test_a_window_that_no_row_reaches_forbids_nothing(capsys: pytest.CaptureFixture[str]):
    loaded, question = toy("mistral", sliding_window=64), toy_question(prompt=20, replies=4)
    score_candidates(loaded, [question], FeatureCache(loaded))
    assert "one by one" not in "".join(capsys.readouterr())
    score_candidates(loaded, [toy_question(prompt=70, replies=4)], FeatureCache(loaded))
    assert "one by one" in "".join(capsys.readouterr())


def test_candidates_do_not_see_each_other(root: Path, loaded: LoadedModel):
    one = read(root, "choice", choice_records(1), loaded)[0]
    changed = Question(
        one.prompt_ids, [one.replies[0], one.replies[3]], [one.reply_labels[0], one.reply_labels[3]], 0, "red",
        one.images, "",
    )  # fmt: skip
    cache = FeatureCache(loaded)
    full, few = score_candidates(loaded, [one], cache)[0], score_candidates(loaded, [changed], cache)[0]
    assert few == pytest.approx([full[0], full[3]], abs=2e-4)


def test_the_end_of_the_reply_counts(loaded: LoadedModel, root: Path):
    question = read(root, "choice", choice_records(1), loaded)[0]
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(
        reply[-1] == labels[-1] == end for reply, labels in zip(question.replies, question.reply_labels, strict=True)
    )


def test_images_are_encoded_once_for_all_that_ask(root: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    encoded: list[int] = []
    encode = type(loaded.model).encode_images

    def counting(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(type(loaded.model), "encode_images", counting)
    tasks = [
        ChoiceTask(name="kind", path=write_records(root / "kind.json", choice_records())),
        RankingTask(name="caption", num_candidates=3,
                   path=write_records(root / "caption.json", caption_records())),
    ]  # fmt: skip
    run_tasks(loaded, EvaluationConfig(tasks=tuple(tasks)), root / "cache")
    assert sum(encoded) == 6


def test_features_beyond_the_memory_limit_are_computed_again(root: Path, loaded: LoadedModel):
    questions = read(root, "choice", choice_records(), loaded)
    small = score_candidates(loaded, questions, FeatureCache(loaded, max_bytes=1, batch_size=2))
    kept = score_candidates(loaded, questions, FeatureCache(loaded))
    assert torch.allclose(torch.tensor(small), torch.tensor(kept), atol=1e-4)


def caption_records() -> list[dict[str, Any]]:
    return [{"image": f"{n}.png", "prompt": "Describe.", "answer": f"A {COLORS[n % 4]} thing {n}."} for n in range(6)]


def test_answers_are_ranked_in_groups_the_same_every_time_each_in_its_own(root: Path, loaded: LoadedModel):
    first, again = (read(root, "ranking", caption_records(), loaded, num_candidates=4) for _ in range(2))
    assert [question.replies for question in first] == [question.replies for question in again]
    for question in first:
        assert len({tuple(reply) for reply in question.replies}) == 4
        assert question.answer_text in loaded.tokenizer.decode(question.replies[question.answer])
    groups = [tuple(map(tuple, question.replies)) for question in first]
    assert sorted(map(groups.count, set(groups))) == [2, 4]  # six answers: four, and two filled up


def test_shuffled_images_of_a_ranking_cost_nothing_as_they_stay_in_their_group(
    root: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    path = write_records(root / "caption.json", caption_records())
    asked: list[tuple[int, int]] = []  # prompts, replies to them
    merge = predict._merge

    def counting(questions: Any) -> Any:
        merged = merge(questions)
        asked.append((len(merged[0]), sum(len(prompt.replies) for prompt in merged[0])))
        return merged

    monkeypatch.setattr(predict, "_merge", counting)
    task = RankingTask(name="caption", num_candidates=3, path=path)
    (row,) = run_tasks(loaded, EvaluationConfig(tasks=(task,)), root / "cache")
    assert asked == [(6, 18)]  # three each, which with images of other groups would be more
    assert row.shuffled is not None


def test_the_loss_task_is_the_mean_cross_entropy_of_the_supervised_tokens(root: Path, loaded: LoadedModel):
    records = [
        {
            "image": f"{n}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A cat." * (n + 1)},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        for n in range(3)
    ]
    path = write_records(root / "loss.json", records)
    config = EvaluationConfig(tasks=(LossTask(name="held out", path=path),))
    row = run_tasks(loaded, config, root / "cache")[0]
    questions = read(root, "loss", records, loaded)
    losses = [-one_forward_per_candidate(loaded, question)[0] for question in questions]
    tokens = [sum(label != IGNORE_INDEX for label in question.reply_labels[0]) for question in questions]
    assert row.own.value == pytest.approx(sum(losses) / sum(tokens), abs=1e-5)
    assert row.baseline is None
    assert row.shuffled is not None
    assert row.shuffled.value != pytest.approx(row.own.value, abs=1e-4)


@pytest.mark.slow
def test_own_images_score_one_and_shuffled_ones_less_where_the_answer_depends_on_the_image(
    root: Path, loaded: LoadedModel
):
    """Among pairs of letters one is found of which the random model likes each for half of the images. What it likes
    is then made the truth, so that only the images tell."""
    cache = FeatureCache(loaded)
    for pair in itertools.combinations("abcdefghijklmnop", 2):
        records = [{"image": f"{n}.png", "prompt": "Which?", "choices": pair, "answer": pair[0]} for n in range(6)]
        scores = score_candidates(loaded, read(root, "choice", records, loaded), cache)
        truth = [pair[0] if first > second else pair[1] for first, second in scores]
        if truth.count(pair[0]) == 3:
            break
    assert truth.count(pair[0]) == 3, "no such pair: take another seed for the random model"
    made = [{**record, "answer": answer} for record, answer in zip(records, truth, strict=True)]
    task = ChoiceTask(name="made", path=write_records(root / "made.json", made))
    row = run_tasks(loaded, EvaluationConfig(tasks=(task,)), root / "cache")[0]
    assert row.own.value == 1.0
    assert row.shuffled is not None
    assert row.shuffled.value < 1.0
    assert (row.baseline, row.baseline_name) == (0.5, "majority")


def run_config(root: Path, tasks: list[dict[str, Any]]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": str(root / "run"),
            "model": model_config(root).model_dump(mode="json"),
            "data": {"sources": [{"path": "records.json"}], "cache": str(root / "cache")},
            "train": {"max_steps": 1},
            "evaluation": {"tasks": tasks},
        }
    )


def test_evaluate_prints_a_table_and_writes_what_it_printed(root: Path, capsys: pytest.CaptureFixture[str]):
    tasks = [
        {"name": "kind", "kind": "choice", "num_candidates": 9,
         "path": write_records(root / "kind.json", choice_records())},
        {"name": "caption", "kind": "ranking", "num_candidates": 5,
         "path": write_records(root / "caption.json", caption_records())},
    ]  # fmt: skip
    rows = evaluate_run(run_config(root, tasks))
    written = json.loads((root / "run" / "evaluation.json").read_text())
    assert written["results"] == rows
    assert [row["task"] for row in rows] == ["kind", "caption"]
    assert [row["baseline"] for row in rows] == [pytest.approx(1 / 3), 0.2]
    assert [row["num_records"] for row in rows] == [6, 6]
    printed = capsys.readouterr()
    assert figures_table(rows) in printed.out
    assert "warning: evaluation.tasks[0].num_candidates is not used: evaluation.tasks[0].kind is choice" in printed.err
    assert figures_table(rows) in (root / "run/export/README.md").read_text()
    evaluate_run(run_config(root, tasks[:1]), out=root / "elsewhere.json")
    assert len(json.loads((root / "elsewhere.json").read_text())["results"]) == 1


def test_every_task_is_read_before_the_first_is_asked(root: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    monkeypatch.setattr("vlm.evaluation.report._ask", lambda *given: asked.append(given))
    tasks = [
        {"name": "kind", "kind": "choice", "path": write_records(root / "kind.json", choice_records())},
        {"name": "bad", "kind": "choice", "path": write_records(root / "bad.json", [{"prompt": "?", "answer": "a"}])},
    ]
    with pytest.raises(DataError, match=r"bad\.json"):
        evaluate_run(run_config(root, tasks))
    assert asked == []


def test_a_loss_task_is_scored_on_blank_images_too(root: Path, loaded: LoadedModel):
    records = [{"image": f"{n}.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": COLORS[n]}
    ]} for n in range(3)]  # fmt: skip
    task = LossTask(name="talk", path=write_records(root / "talk.json", records), images=str(root))
    (row,) = run_tasks(loaded, EvaluationConfig(tasks=(task,)), root / "cache")
    white = [root / f"white-{n}.png" for n in range(3)]
    for path in white:
        Image.new("RGB", (9, 9), "white").save(path)
    blank = [{**record, "image": path.name} for record, path in zip(records, white, strict=True)]
    task = task.model_copy(update={"path": write_records(root / "blank.json", blank)})
    (expected,) = run_tasks(loaded, EvaluationConfig(tasks=(task,)), root / "cache")
    assert row.blank.value == pytest.approx(expected.own.value, rel=1e-6)
    assert row.blank.value != pytest.approx(row.own.value, rel=1e-3)


class BestOfTwo(ChoiceTask):
    """A kind that only the test below knows."""

    kind: Literal["best_of_two"] = "best_of_two"

    metric = "accuracy of two"

    def figure(self, questions: Sequence[Question], scores: list[list[float]]) -> Figure:
        pairs = zip(questions, scores, strict=True)
        ranks = [sorted(some, reverse=True).index(some[each.answer]) for each, some in pairs]
        return Figure(sum(rank < 2 for rank in ranks) / len(ranks), 0.0, len(ranks))


def test_a_new_kind_of_task_is_a_class_and_a_line(root: Path, loaded: LoadedModel):
    path = write_records(root / "kind.json", choice_records())
    with registered(TASKS, BestOfTwo):
        config = run_config(root, [{"name": "two", "kind": "best_of_two", "path": path}]).evaluation
    (row,) = run_tasks(loaded, config, root / "cache")
    (best,) = run_tasks(loaded, EvaluationConfig(tasks=(ChoiceTask(name="one", path=path),)), root / "cache")
    assert (row.kind, row.metric, row.baseline) == ("best_of_two", "accuracy of two", best.baseline)
    assert row.own.value >= best.own.value


def test_a_config_without_tasks_says_so(root: Path):
    with pytest.raises(ConfigError, match=r"no evaluation\.tasks.* docs/evaluation\.md"):
        evaluate_run(run_config(root, []))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"image": "0.png", "prompt": "?", "choices": ["a", "b"], "answer": "c"},
            r"record 1: answer 'c' must stand once",
        ),
        ({"image": "0.png", "prompt": "?", "answer": "c"}, r"record 1: no choices"),
        ({"image": "../0.png", "prompt": "?", "choices": ["a"], "answer": "a"}, r"record 1: .*leads out of"),
        ({"image": "none.png", "prompt": "?", "choices": ["a"], "answer": "a"}, r"record 1: .*is no file below"),
        (
            {"image": "0.png", "prompt": 3, "choices": ["a"], "answer": "a"},
            r"record 1: prompt, answer and every choice",
        ),
    ],
)
def test_a_bad_record_stops_the_evaluation_and_is_named(
    root: Path, loaded: LoadedModel, record: dict[str, Any], message: str
):
    with pytest.raises(DataError, match=message):
        read(root, "choice", [record], loaded)


def test_more_candidates_than_answers_is_an_error_with_both_numbers(root: Path, loaded: LoadedModel):
    with pytest.raises(DataError, match=r"6 different answers, num_candidates is 20"):
        read(root, "ranking", caption_records(), loaded)


def test_bfloat16_ranks_as_float32_does_here(root: Path, loaded: LoadedModel):
    half = load(root / "run" / "export", device="cpu", precision="bf16")
    questions = read(root, "choice", choice_records(), loaded)
    found = torch.tensor(score_candidates(half, questions, FeatureCache(half)))
    expected = torch.tensor(score_candidates(loaded, questions, FeatureCache(loaded)))
    # worst difference seen: 0.21, of sums from -47 to -16
    assert (found - expected).abs().max().item() < 1.0
