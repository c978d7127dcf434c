from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_export import model_config, write_image, write_run

from vlm.apps.session import ChatSession
from vlm.data.conversation import IMAGE
from vlm.errors import ConfigError, RecordError
from vlm.export.run import export_run
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import LoadedModel, load

SHORT = GenerationSettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    write_run(root / "run", model_config(root))
    write_image(root / "cat.png")
    write_image(root / "dog.png", seed=2)
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedModel:
    return load(export_run(root / "run"), device="cpu", precision="fp32")


@pytest.fixture
def session(loaded: LoadedModel) -> ChatSession:
    return ChatSession(loaded)


def ask(session: ChatSession, question: str) -> str:
    return "".join(session.ask(question, SHORT)).strip()


@pytest.mark.slow
def test_a_conversation_remembers_questions_replies_and_images(session: ChatSession, root: Path):
    session.add_image(root / "cat.png")
    first = ask(session, "What is this?")
    second = ask(session, "And now?")
    assert session.history == [("What is this?", first), ("And now?", second)]
    turns = session.conversation("Third").turns
    assert [turn.role for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[0].parts == (IMAGE, "\nWhat is this?")
    assert turns[2].parts == ("And now?",)
    assert session.images == [str(root / "cat.png")]


def test_the_second_reply_depends_on_the_first_exchange(session: ChatSession):
    alone = ask(session, "And now?")
    session.clear()
    ask(session, "One two three four five")
    assert ask(session, "And now?") != alone


def test_the_system_prompt_comes_first(loaded: LoadedModel):
    turns = ChatSession(loaded, system="Be brief.").conversation("Hello").turns
    assert [(turn.role, turn.text) for turn in turns] == [("system", "Be brief."), ("user", "Hello")]


def test_an_image_may_come_later_and_a_second_one_too(session: ChatSession, root: Path):
    ask(session, "Hello")
    session.add_image(root / "cat.png")
    ask(session, "What is this?")
    session.add_image(root / "dog.png")
    turns = session.conversation("And this?").turns
    assert [turn.num_images for turn in turns] == [0, 0, 1, 0, 1]
    assert session.images == [str(root / "cat.png"), str(root / "dog.png")]


def test_clear_forgets_all_or_keeps_the_images(session: ChatSession, root: Path):
    session.add_image(root / "cat.png")
    ask(session, "What is this?")
    session.clear(keep_images=True)
    assert session.history == []
    assert session.conversation("Again").turns[0].parts == (IMAGE, "\nAgain")
    session.clear()
    assert session.images == []


def test_undo_takes_back_one_exchange_with_its_image(session: ChatSession, root: Path):
    session.add_image(root / "cat.png")
    ask(session, "What is this?")
    assert session.undo() == "What is this?"
    assert session.history == []
    assert session.conversation("Another try").turns[0].num_images == 1
    assert session.undo() is None


def test_retry_repeats_a_greedy_reply_and_keeps_one_exchange(session: ChatSession):
    reply = ask(session, "Hello")
    assert "".join(session.retry(SHORT)).strip() == reply
    assert session.history == [("Hello", reply)]
    session.clear()
    with pytest.raises(ConfigError, match="no question"):
        session.retry(SHORT)


def test_retry_with_another_seed_gives_another_reply(session: ChatSession):
    ask(session, "Hello")
    replies = {
        "".join(session.retry(GenerationSettings(max_new_tokens=8, do_sample=True, temperature=3.0, seed=seed)))
        for seed in range(4)
    }
    assert len(replies) > 1


def test_stop_from_another_thread_ends_the_reply_and_keeps_what_was_written(session: ChatSession):
    pieces = session.ask("Hello", GenerationSettings(max_new_tokens=200))
    written = next(pieces)
    thread = threading.Thread(target=session.stop)
    thread.start()
    thread.join()
    written += "".join(pieces)
    assert session.history == [("Hello", written.strip())]
    assert len(written) < 100  # 200 tokens would be more
    assert ask(session, "Next") is not None  # the stop is over


def test_a_reply_that_fails_leaves_the_conversation_as_it_was(
    session: ChatSession, root: Path, monkeypatch: pytest.MonkeyPatch
):
    session.add_image(root / "cat.png")
    with monkeypatch.context() as patch:
        patch.setattr("vlm.inference.load.generate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(session, "What is this?")
    assert session.history == []
    assert session.conversation("Again").turns[0].num_images == 1
    ask(session, "Again")
    assert len(session.history) == 1


def test_a_reply_that_nobody_began_to_read_leaves_the_conversation_as_it_was(session: ChatSession):
    session.ask("Hello", SHORT)
    assert session.history == []


def test_an_over_long_conversation_says_so_and_changes_nothing(session: ChatSession):
    with pytest.raises(ConfigError, match="reads at most 256"):
        session.ask("one two three " * 100, SHORT)
    assert session.history == []


def test_an_image_is_checked_when_it_is_added(session: ChatSession, root: Path):
    (root / "no.png").write_text("<html>")
    with pytest.raises(RecordError, match=r"no\.png"):
        session.add_image(root / "no.png")
    with pytest.raises(RecordError, match="does not exist"):
        session.add_image(root / "missing.png")
    assert session.images == []


def test_another_image_starts_another_conversation_unless_it_cannot_be_read(session: ChatSession, root: Path):
    session.set_images([root / "cat.png"])
    ask(session, "What is this?")
    with pytest.raises(RecordError):
        session.set_images([root / "missing.png"])
    assert len(session.history) == 1
    session.set_images([root / "dog.png"])
    assert session.history == []
    assert session.images == [str(root / "dog.png")]


def test_several_images_are_added_together_or_not_at_all(session: ChatSession, root: Path):
    session.add_images([root / "cat.png", root / "dog.png"])
    assert session.conversation("Compare").turns[0].num_images == 2
    with pytest.raises(RecordError):
        session.add_images([root / "cat.png", root / "missing.png"])
    with pytest.raises(RecordError, match="nothing is fetched"):
        session.set_images(["https://a.example/cat.png"])
    assert session.images == [str(root / "cat.png"), str(root / "dog.png")]


def test_a_retry_that_fails_keeps_the_old_reply(session: ChatSession, root: Path, monkeypatch: pytest.MonkeyPatch):
    session.add_image(root / "cat.png")
    ask(session, "What is this?")
    before = session.exchanges
    with monkeypatch.context() as patch:
        patch.setattr("vlm.inference.load.generate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            "".join(session.retry(SHORT))
        patch.setattr("vlm.inference.load.load_image", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.retry(SHORT)
    session.retry(SHORT)  # nobody reads it
    assert session.exchanges == before


def test_an_image_added_since_joins_the_question_that_is_asked_again(session: ChatSession, root: Path):
    session.add_image(root / "cat.png")
    ask(session, "What is this?")
    session.add_image(root / "dog.png")
    "".join(session.retry(SHORT))
    assert session.exchanges[0].images == (str(root / "cat.png"), str(root / "dog.png"))
    assert session.conversation("Next").turns[-1].num_images == 0


def test_a_beam_search_can_be_stopped_too(loaded: LoadedModel):
    session = ChatSession(loaded)
    steps = []

    def stop_at_the_third_step(*_: object) -> None:
        steps.append(1)
        if len(steps) == 3:
            session.stop()

    hook = loaded.model.llm.register_forward_pre_hook(stop_at_the_third_step)
    try:
        assert "".join(session.ask("Hello", GenerationSettings(max_new_tokens=64, num_beams=2))) == ""
    finally:
        hook.remove()
    assert len(steps) == 3
    assert session.history == [("Hello", "")]


def test_the_system_prompt_in_use_is_the_sessions_else_the_exports(loaded: LoadedModel):
    assert ChatSession(loaded).system_in_use is None
    assert ChatSession(replace(loaded, system="From the export.")).system_in_use == "From the export."
    assert ChatSession(replace(loaded, system="From the export."), "Mine.").system_in_use == "Mine."
