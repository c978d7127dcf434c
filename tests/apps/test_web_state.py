"""What a page remembers, with a model that says what it was asked."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_export import write_image

from vlm.apps.session import Exchange
from vlm.apps.web.models import Export, ModelStore
from vlm.apps.web.state import MAX_IMAGES, MAX_QUESTION, PageError, WebChat
from vlm.apps.web.texts import _TEXTS, tell
from vlm.apps.web.uploads import Uploads
from vlm.data.records import parse_record
from vlm.errors import CheckpointError, ConfigError
from vlm.generation.generate import GenerationSettings


def settings_of(panel: dict[str, Any]) -> GenerationSettings:
    from vlm.apps.web.page import settings_of  # gradio takes seconds to import

    return settings_of(panel)


ANNA, BERT = "a" * 32, "b" * 32
LEAK = re.compile(r"0x|/|Traceback|\.py")


class Echo:
    """Stands for a LoadedModel. Its reply is the number of its own, of the turns, and the last question."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.image_spec: object | None = object()
        self.system = None
        self.tokenizer = SimpleNamespace(encode=lambda text, **_: text.split())
        self.before_each: Callable[[], None] = lambda: None
        self.asked: list[Any] = []

    def stream(
        self, conversation: Any, settings: GenerationSettings, stop: Any, should_stop: Callable[[], bool]
    ) -> Generator[str, None, None]:
        self.asked.append(conversation)
        return self._pieces(f"{self.number}:{len(conversation.turns)} {conversation.turns[-1].text.strip()}")

    def _pieces(self, text: str) -> Generator[str, None, None]:
        for word in text.split(" "):
            self.before_each()
            yield word + " "


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    loaded = {f"m{number}": Echo(number) for number in range(2)}

    def load(path: Path, on_progress: Callable[[float], None]) -> Any:
        on_progress(0.5)
        on_progress(1.0)
        return loaded[path.name]

    exports = [Export(f"run/{name}", tmp_path / name) for name in loaded]
    return ModelStore(exports, max_loaded=2, load_export=load)


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "up").mkdir()
    return Uploads(tmp_path / "up")


@pytest.fixture
def chat(models: ModelStore, uploads: Uploads) -> WebChat:
    chat = WebChat(models, uploads)
    chat.claim(ANNA)
    return chat


@pytest.fixture
def cat(uploads: Uploads) -> str:
    path = str(write_image(uploads.folder / "cat.png"))
    uploads.accept(ANNA, [path])
    return path


def model_of(chat: WebChat, number: int = 0) -> Any:
    return chat.models.get(number)


def answer(chat: WebChat, model: int = 0, system: str | None = None) -> list[list[dict[str, Any]]]:
    """Every state of the messages that the page is sent."""
    shown = list(chat.answer(model, GenerationSettings(), system))
    assert chat.take_back() is None
    return shown


def said(chat: WebChat) -> list[tuple[str, str]]:
    return [(exchange.question, exchange.reply) for exchange in chat.exchanges]


def test_a_question_is_answered_with_its_numbers(chat: WebChat):
    chat.ask("What now?", [])
    shown = answer(chat)
    assert said(chat) == [("What now?", "0:1 What now?")]
    texts = [message["content"][0]["text"] for message in shown[-1]]
    assert texts[:2] == ["What now?", "0:1 What now?"]
    assert re.search(r"run/m0 · 3 tokens · \d+\.\d s · \d+ tokens/s · first after \d+\.\d s", texts[2])
    assert "run/m0 · 3 个词元" in chat.stats[0].told("zh")


def test_the_bar_moves_while_the_model_loads_and_is_gone_the_second_time(chat: WebChat):
    chat.ask("One", [])
    bars = [text for shown in answer(chat) if "<progress" in (text := shown[-1]["content"][0]["text"])]
    assert [re.search(r"value='(.+?)'", bar).group(1) for bar in bars] == ["0.00", "0.50", "1.00"]
    assert all("Loading run/m0" in bar for bar in bars)
    chat.ask("Two", [])
    assert not any("<progress" in str(shown) for shown in answer(chat))


def test_the_answer_grows(chat: WebChat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.apps.web.state.SECONDS_BETWEEN_UPDATES", -1.0)
    chat.ask("one two three", [])
    live = [shown[-1]["content"][0]["text"] for shown in answer(chat)]
    assert live[-5:-1] == ["0:1 ", "0:1 one ", "0:1 one two ", "0:1 one two three "]


def test_images_stand_before_the_words_and_reach_the_model(chat: WebChat, cat: str):
    chat.ask("What is this?", [cat, cat])
    shown = answer(chat)[-1]
    assert [message["content"] for message in shown[:2]] == [{"path": cat}, {"path": cat}]
    assert model_of(chat).asked[-1].images == (cat, cat)
    chat.ask("And?", [])
    answer(chat)
    assert len(model_of(chat).asked[-1].images) == 2  # the model still sees them


def test_the_system_prompt_is_part_of_what_the_model_reads_and_of_the_record(chat: WebChat):
    from vlm.apps.record import training_record
    from vlm.data.config import SourceConfig

    chat.ask("Hello", [])
    answer(chat, system="Be brief.")
    assert [turn.role for turn in model_of(chat).asked[-1].turns] == ["system", "user"]
    conversation = parse_record(training_record(chat), SourceConfig(path="x"))
    assert [turn.text for turn in conversation.turns] == ["Be brief.", "Hello", "0:2 Hello"]


def test_another_model_goes_on_with_the_same_conversation(chat: WebChat):
    for question, model in (("One", 0), ("Two", 1)):
        chat.ask(question, [])
        answer(chat, model)
    assert said(chat) == [("One", "0:1 One"), ("Two", "1:3 Two")]
    assert [stats.model for stats in chat.stats] == ["run/m0", "run/m1"]


def talk(chat: WebChat, cat: str) -> None:
    chat.ask("First", [cat])
    answer(chat)
    chat.ask("Second", [])
    answer(chat)


def test_the_n_th_message_belongs_to_an_exchange(chat: WebChat, cat: str):
    talk(chat, cat)  # image, First, reply, numbers, Second, reply, numbers
    assert [chat.exchange_of(number) for number in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    assert len(chat.messages()) == 7
    for wrong in (-1, 7):
        with pytest.raises(PageError, match="no_turn"):
            chat.exchange_of(wrong)


def test_retry_asks_the_same_question_with_its_images(chat: WebChat, cat: str):
    talk(chat, cat)
    chat.retry(1)
    assert [message["content"] for message in chat.messages()] == [{"path": cat}, [{"type": "text", "text": "First"}]]
    answer(chat, model=1)
    assert said(chat) == [("First", "1:1 First")]
    assert chat.exchanges[0].images == (cat,)


def test_edit_asks_other_words_with_the_same_images(chat: WebChat, cat: str):
    talk(chat, cat)
    chat.edit(1, "Other")
    answer(chat)
    assert chat.exchanges == [Exchange("Other", (cat,), "0:1 Other")]


def test_undo_takes_a_question_and_what_came_after_back(chat: WebChat, cat: str):
    talk(chat, cat)
    assert chat.undo(5).question == "Second"
    assert chat.undo(2) == Exchange("First", (cat,), "0:1 First")
    assert chat.messages() == []


def test_clear_forgets_everything(chat: WebChat, cat: str):
    talk(chat, cat)
    chat.clear()
    assert chat.messages() == []
    chat.ask("New", [])
    answer(chat)
    assert len(model_of(chat).asked[-1].images) == 0


def test_stop_keeps_what_was_written_and_says_so(chat: WebChat):
    count = 0

    def stop_at_the_third() -> None:
        nonlocal count
        count += 1
        if count == 3:
            chat.stop()

    model_of(chat).before_each = stop_at_the_third
    chat.ask("one two three four five", [])
    answer(chat)
    assert chat.exchanges[0].reply.startswith("0:1 one")
    assert "five" not in chat.exchanges[0].reply
    assert chat.stats[0].told("en").endswith("stopped")
    model_of(chat).before_each = lambda: None
    chat.ask("again", [])
    answer(chat)
    assert chat.exchanges[1].reply == "0:3 again"


def test_stop_before_the_first_word_gives_the_question_back(chat: WebChat, cat: str):
    chat.ask("Hello", [cat])
    chat.stop()
    assert list(chat.answer(0, GenerationSettings(), None)) == []
    left = chat.take_back()
    assert (left.question, left.images, left.is_new) == ("Hello", (cat,), True)
    assert chat.messages() == []


def test_a_retry_that_comes_to_nothing_leaves_the_conversation_as_it_was(chat: WebChat, cat: str):
    talk(chat, cat)
    before = chat.messages()
    chat.retry(0)
    chat.stop()
    list(chat.answer(0, GenerationSettings(), None))
    assert chat.take_back().is_new is False
    assert chat.messages() == before


def test_clear_while_an_answer_is_written_wins(chat: WebChat):
    chat.ask("one two three", [])
    writing = chat.answer(0, GenerationSettings(), None)
    next(writing)
    chat.clear()
    assert list(writing) == [] or chat.messages() == []
    chat.take_back()
    assert said(chat) == []


def test_two_answers_at_once_are_refused(chat: WebChat):
    chat.ask("One", [])
    for act in (lambda: chat.ask("Two", []), lambda: chat.retry(0), lambda: chat.edit(0, "x"), lambda: chat.undo(0)):
        with pytest.raises(PageError, match="busy"):
            act()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("at 0x7f00 in /srv/model.py"), "The answer failed. The server's log says why."),
        (ConfigError("the conversation has 9,000 tokens, see /srv/x"), "The conversation is longer than this model"),
    ],
)
def test_an_error_is_told_in_our_words_and_logged(
    chat: WebChat, cat: str, error: Exception, told: str, capsys: pytest.CaptureFixture[str]
):
    def fail() -> None:
        raise error

    talk(chat, cat)
    before = chat.messages()
    model_of(chat).before_each = fail
    chat.ask("Third", [cat])
    with pytest.raises(PageError) as raised:
        list(chat.answer(0, GenerationSettings(), None))
    text = raised.value.told("en")
    assert text.startswith(told)
    assert not LEAK.search(text.replace("server's", ""))
    captured = capsys.readouterr()
    assert str(error) in captured.out + captured.err
    assert chat.take_back().question == "Third"
    assert chat.messages() == before
    assert not chat.models.is_busy


def test_a_model_that_cannot_be_loaded_says_so_without_a_path(models: ModelStore, uploads: Uploads):
    def load(path: Path, on_progress: Callable[[float], None]) -> Any:
        raise CheckpointError(f"{path}/projector.safetensors is damaged")

    chat = WebChat(ModelStore(models.exports, load_export=load), uploads)
    chat.claim(ANNA)
    chat.ask("Hello", [])
    with pytest.raises(PageError) as raised:
        list(chat.answer(0, GenerationSettings(), None))
    assert raised.value.told("en") == "run/m0 cannot be loaded. The server's log says why."
    assert not chat.models.is_busy


@pytest.mark.parametrize("number", [-1, 2, 10**9])
def test_a_model_is_chosen_from_the_list_only(chat: WebChat, number: int):
    chat.ask("Hello", [])
    with pytest.raises(PageError, match="no_model"):
        list(chat.answer(number, GenerationSettings(), None))


def test_a_model_without_encoder_says_so(chat: WebChat, cat: str):
    model_of(chat).image_spec = None
    chat.ask("What?", [cat])
    with pytest.raises(PageError, match="no_images"):
        list(chat.answer(0, GenerationSettings(), None))


# Sessions


def test_every_page_starts_with_nothing_of_another(chat: WebChat, cat: str):
    talk(chat, cat)
    other = copy.deepcopy(chat)  # what gradio does when a page opens
    assert other.messages() == []
    assert other.owner is None
    assert other.models is chat.models


def test_an_image_of_another_browser_is_refused(chat: WebChat, cat: str, models: ModelStore, uploads: Uploads):
    other = WebChat(models, uploads)
    other.claim(BERT)
    for path in (cat, "/etc/passwd", str(uploads.folder / "missing.png"), ""):
        with pytest.raises(PageError, match="not_yours"):
            other.ask("What is this?", [path])
    assert other.asked is None
    chat.ask("What is this?", [cat])  # its own browser may


def test_a_page_belongs_to_the_browser_that_opened_it(chat: WebChat):
    for other in (BERT, None):
        with pytest.raises(PageError, match="other_browser"):
            chat.claim(other)
    chat.claim(ANNA)


def test_questions_and_images_have_limits(chat: WebChat, cat: str):
    for text, images, refused in (
        ("", [], "nothing_asked"),
        (" \n", [], "nothing_asked"),
        ("x" * (MAX_QUESTION + 1), [], "question_too_long"),
        ("What?", [cat] * (MAX_IMAGES + 1), "too_many_images"),
    ):
        with pytest.raises(PageError, match=refused):
            chat.ask(text, images)
    chat.ask("x" * MAX_QUESTION, [cat] * MAX_IMAGES)


def test_an_image_that_became_unreadable_is_told_without_the_decoders_words(chat: WebChat, cat: str):
    Path(cat).write_bytes(b"no image")
    with pytest.raises(PageError) as raised:
        chat.ask("What?", [cat])
    assert raised.value.told("en").startswith("cat.png is no image that can be read.")
    assert not LEAK.search(raised.value.told("en"))


# Settings and texts


PANEL = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "num_beams": 1, "max_new_tokens": 64,
         "repetition_penalty": 1.1, "seed": 7, "length_penalty": 1.0}  # fmt: skip


def test_the_panel_becomes_settings():
    assert settings_of(PANEL) == GenerationSettings(64, True, 0.7, 0.9, 40, 1.1, 1, 7)
    assert settings_of(PANEL | {"seed": -1}).seed is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", float("nan")), ("temperature", 0), ("top_p", 1.5), ("top_k", -1), ("top_k", 1.5),
     ("num_beams", 10**6), ("max_new_tokens", 10**9), ("max_new_tokens", "64"), ("max_new_tokens", None),
     ("repetition_penalty", 0), ("length_penalty", 9), ("seed", -2), ("seed", float("inf")), ("num_beams", True)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any):
    with pytest.raises(PageError) as raised:
        settings_of(PANEL | {name: value})
    assert name in raised.value.told("en")


@pytest.mark.parametrize("name", _TEXTS)
def test_every_text_has_both_languages_with_the_same_places(name: str):
    english, chinese = (re.findall(r"\{(\w+)", text) for text in _TEXTS[name])
    assert sorted(english) == sorted(chinese)
    assert re.search("[一-鿿]", _TEXTS[name][1]) or name in ("language", "top_p", "top_k")
    if not english:
        assert tell("zh", name)
