"""The page in headless Chromium, with tiny models: what a user does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from browser_user import MARKS, SENTENCE, Page, endless_answers

from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE
from vlm.data.records import parse_record

pytest_plugins = ["browser_user"]
pytestmark = MARKS


def test_upload_ask_and_see_the_answer_with_its_numbers(visit: Callable[..., Page], root: Path):
    user = visit()
    stats = user.ask("What is this?", root / "cat.png", root / "dog.png")
    assert re.fullmatch(r"first · \d+ tokens · .+ s · \d+ tokens/s · first after .+ s( · cut at .+)?", stats)
    assert len(user.images()) == 2
    assert "What is this?" in user.page.inner_text("#chat")
    assert user.page.input_value("#box textarea") == ""
    assert user.page.locator("#box img").count() == 0
    assert user.problems == []


def test_the_answer_streams_and_stop_keeps_what_was_written(visit: Callable[..., Page]):
    user = visit()
    user.ask("Hello")
    with endless_answers():
        user.type(SENTENCE)
        user.see_it_grow()
        user.page.click("#box button[data-name=Stop]")
        user.answered(2)
    assert user.stats()[1].endswith("stopped")
    tokens = int(re.search(r"(\d+) tokens", user.stats()[1]).group(1))
    assert 0 < tokens < 4000
    user.set_length(4)
    user.ask("And now?")  # the next answer is not stopped
    assert not user.stats()[2].endswith("stopped")


def test_retry_undo_and_edit(visit: Callable[..., Page], root: Path):
    user = visit()
    user.ask("First question", root / "cat.png")
    user.ask("Second question")
    with user.another_answer(2):
        user.click("Retry")
    assert "Second question" in user.page.inner_text("#chat")
    user.click("Undo")
    user.page.wait_for_function("document.querySelectorAll('#chat .stats').length === 1")
    assert user.page.input_value("#box textarea") == "Second question"
    assert "Second question" not in user.page.inner_text("#chat")
    user.click("Edit")
    user.page.locator("#chat textarea").last.fill("Edited question")
    with user.another_answer(1):
        user.click("Submit")
    assert "Edited question" in user.page.inner_text("#chat")
    assert "First question" not in user.page.inner_text("#chat")
    assert len(user.images()) == 1  # the image stayed
    user.page.fill("#box textarea", "")
    user.click("Undo")
    user.page.wait_for_function("document.querySelectorAll('#box img').length === 1")
    assert user.page.input_value("#box textarea") == "Edited question"


def test_clear_begins_a_new_conversation(visit: Callable[..., Page], root: Path):
    user = visit()
    user.ask("What is this?", root / "cat.png")
    user.page.click("#clear")
    user.page.wait_for_selector("#chat .example")
    assert user.stats() == []
    user.ask("Hello")
    assert user.images() == []


def test_another_model_goes_on(visit: Callable[..., Page]):
    user = visit()
    assert user.ask("Hello").startswith("first")
    user.open_panel()
    user.page.click("#model input")
    user.page.locator("#model [role=option]").filter(has_text="second").click()
    seen = user.page.evaluate_handle(
        "() => { const seen = []; new MutationObserver(() => { const bar = document.querySelector('#chat progress');"
        " if (bar) seen.push(bar.value); }).observe(document.body, {subtree: true, childList: true, attributes: true});"
        " return seen; }"
    )
    assert user.ask("Hello again").startswith("second")
    assert user.stats()[0].startswith("first")
    assert seen.json_value()  # the bar was there while it loaded


def test_all_texts_change_with_the_language_and_stay_so(visit: Callable[..., Page]):
    user = visit()
    user.ask("Hello")
    english = texts(user)
    assert not any(re.search("[一-鿿]", text) for text in english - {"中文"})
    user.page.click("#language")
    user.page.wait_for_function("document.documentElement.lang === 'zh'")
    user.page.wait_for_function("document.querySelector('#chat .stats').innerText.includes('个词元')")

    def is_chinese() -> bool:
        left = {text for text in texts(user) & english if re.search("[A-Za-z]{2}", text)}
        return left <= {"Hello", "first", "Top-p", "Top-k", *user.page.locator("#chat .md").all_inner_texts()}

    user.until(is_chinese)
    user.page.wait_for_function("document.cookie.includes('vlm_language=zh')")
    user.open()  # a reload remembers
    assert user.page.inner_text("#language").strip() == "English"
    user.page.click("#language")
    user.page.wait_for_function("document.documentElement.lang === 'en'")


def texts(user: Page) -> set[str]:
    """Every text and name of a button that a reader meets."""
    found = user.page.evaluate(
        "() => [...document.querySelectorAll('button, label, h2, textarea, small, .md, span, .info')]"
        ".flatMap(e => [e.title, e.placeholder, e.getAttribute('aria-label'),"
        " e.children.length ? '' : e.textContent]).filter(Boolean).map(text => text.trim())"
    )
    return {text for text in found if text}


def test_a_chinese_browser_sees_chinese(visit: Callable[..., Page]):
    user = visit(locale="zh-CN")
    assert user.page.inner_text("#clear").strip() == "新对话"
    user.page.wait_for_function("document.querySelector('#box button[title=\"提交\"]') !== null")


def test_an_example_is_asked_at_once(visit: Callable[..., Page], root: Path):
    user = visit()
    user.page.locator("#chat .example").first.click()
    user.answered(1)
    assert "Which animal?" in user.page.inner_text("#chat")
    (source,) = user.images()
    assert user.page.request.get(source).body() == (root / "example.png").read_bytes()
    assert str(root) not in user.page.content()


def test_the_conversation_is_saved_as_a_training_record(visit: Callable[..., Page], root: Path):
    user = visit()
    user.open_panel()
    user.page.fill("#system textarea", "Be brief.")
    user.page.click("#save")
    assert "There is no answer to save yet." in user.notice()
    user.ask("What is this?", root / "cat.png")
    with user.page.expect_download() as download:
        user.page.click("#save")
    assert download.value.suggested_filename == "conversation.jsonl"
    record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    conversation = parse_record(record, SourceConfig(path="x"))
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant"]
    assert conversation.turns[1].parts == (IMAGE, "\nWhat is this?")
    assert conversation.images == ((root / "cat.png").read_bytes(),)


def test_dark_and_light_are_remembered(visit: Callable[..., Page]):
    user = visit(color_scheme="dark")
    is_dark = "document.body.classList.contains('dark')"
    assert user.page.evaluate(is_dark)
    user.page.click("#theme")
    assert not user.page.evaluate(is_dark)
    user.open()
    assert not user.page.evaluate(is_dark)


def test_a_phone_shows_all_of_it(visit: Callable[..., Page], root: Path):
    user = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    user.ask("What is this?", root / "cat.png")
    assert user.page.evaluate("document.documentElement.scrollWidth") <= 390
    for selector in ("#box textarea", "#clear", "#language", "#theme", "#box button[data-name=Submit]"):
        box = user.page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844
    user.open_panel()

    def is_inside() -> bool:  # it slides in
        box = user.page.locator("#model").bounding_box()
        return box["x"] >= 0 and box["x"] + box["width"] <= 390

    user.until(is_inside)
