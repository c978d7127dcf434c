"""Our models for lmms-eval, called as it calls them. The package itself is in
`test_lmms_package.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vlm.errors import ConfigError, RecordError

NUM_RECORDS = 9


class Lmms:
    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


class ChatMessages:
    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages

    def extract_media(self) -> tuple[list[Any], list[Any], list[Any]]:
        parts = [part for message in self.messages for part in message["content"]]
        images, videos = ([part["url"] for part in parts if part["type"] == kind] for kind in ("image", "video"))
        return images, videos, []

    def model_dump(self) -> dict[str, Any]:
        return {"messages": self.messages}


@pytest.fixture(scope="module")
def package() -> Iterator[None]:
    """As much of lmms-eval 0.7.3 as a model of it sees."""
    found = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}, "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models.registry_v2": {"ModelManifest": lambda **values: SimpleNamespace(**values)},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        for name, content in found.items():
            module = ModuleType(name)
            vars(module).update(content)
            patched.setitem(sys.modules, name, module)
        patched.delitem(sys.modules, "vlm.apps.lmms_model", raising=False)
        yield
    sys.modules.pop("vlm.apps.lmms_model", None)


@pytest.fixture(scope="module")
def docs(seeing: Path) -> list[dict[str, Any]]:
    lines = (seeing / "test.jsonl").read_text().splitlines()[:NUM_RECORDS]
    return [json.loads(line) for line in lines]


def model_of(name: str, seeing: Path, docs: list[dict[str, Any]]) -> Any:
    from vlm.apps import lmms_model

    model = getattr(lmms_model, name)(str(seeing / "run/export"), device="cpu", precision="fp32", batch_size="4")
    model.task_dict = {"colours": {"test": docs}}
    return model


def open_image(seeing: Path, doc: dict[str, Any]) -> Image.Image:
    return Image.open(seeing / doc["image"])


def test_the_entry_point_names_classes_that_are_there(package: None):
    from vlm.apps import lmms_model
    from vlm.apps.lmms_plugin import manifests

    (manifest,) = manifests()
    assert manifest.model_id == "vlm"
    for path, is_simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, name = path.rsplit(".", 1)
        assert module == lmms_model.__name__
        assert getattr(lmms_model, name).is_simple is is_simple


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_requests_from_texts_and_from_messages(
    package: None, seeing: Path, docs: list[dict[str, Any]]
):
    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        shown = {"type": "image", "url": open_image(seeing, doc)}
        return [{"role": "user", "content": [shown, {"type": "text", "text": doc["prompt"]}]}]

    right = [doc["answer"] for doc in docs]
    settings = [{"max_new_tokens": 8, "until": ["\n\n"]}, {"max_new_tokens": 8, "temperature": 0, "num_beams": 1}]
    simple, chat = model_of("SimpleModel", seeing, docs), model_of("ChatModel", seeing, docs)
    show = lambda doc: [open_image(seeing, doc)]  # noqa: E731
    asked = [(doc["prompt"], settings[n % 2], show, n, "colours", "test") for n, doc in enumerate(docs)]
    texts = simple.generate_until([SimpleNamespace(args=args) for args in asked])
    assert texts == right
    requests = [SimpleNamespace(args=("", messages, settings[n % 2], n, "colours", "test")) for n in range(NUM_RECORDS)]
    assert chat.generate_until(requests) == right
    film = SimpleNamespace(args=("", lambda doc: [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}],
                                 {}, 0, "colours", "test"))  # fmt: skip
    with pytest.raises(RecordError, match="colours test 0: videos and sounds are not read"):
        chat.generate_until([film])
    with pytest.raises(ConfigError, match="--model_args of vlm: dtype is not known"):
        type(simple)("x", dtype="fp32")


@pytest.mark.slow
def test_continuations_have_their_mean_loss_without_the_end_of_the_reply(
    package: None, seeing: Path, docs: list[dict[str, Any]]
):
    from vlm.evaluation.predict import FeatureCache, score_candidates
    from vlm.evaluation.questions import OpenQuestion, Question
    from vlm.evaluation.task_kinds import GenerateTask

    model = model_of("SimpleModel", seeing, docs)
    names = ["red", "green", "blue"]
    show = lambda doc: [open_image(seeing, doc)]  # noqa: E731
    scores = model.loglikelihood(
        [SimpleNamespace(args=("Which colour?", f" {name}", show, 1, "colours", "test")) for name in names]
    )
    assert [is_greedy for _, is_greedy in scores] == [False, True, False]
    task = GenerateTask(name="colour", path=str(seeing / "test.jsonl"), max_records=2)
    question: OpenQuestion = task.questions(model.loaded.conversation_tokenizer, seeing / "cache")[1]
    replies = [model.loaded.tokenizer(name, add_special_tokens=False).input_ids for name in names]
    asked = Question(question.prompt_ids, replies, replies, 0, "", question.images, "")
    (expected,) = score_candidates(model.loaded, [asked], FeatureCache(model.loaded))
    losses = [-score / len(reply) for score, reply in zip(expected, replies, strict=True)]
    assert [loss for loss, _ in scores] == pytest.approx(losses, abs=1e-4)
    assert min(range(3), key=lambda place: scores[place][0]) == 1  # lmms-eval takes the least: green
    (computed,) = model.loglikelihood(
        [SimpleNamespace(args=("Which colour?", lambda doc: doc["answer"], show, 1, "colours", "test"))]
    )
    assert computed == pytest.approx(scores[1])
