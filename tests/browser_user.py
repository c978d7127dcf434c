"""A user of the browser chat: a served page with tiny models, and headless Chromium. Fixtures of the browser tests."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_export import model_config, write_image, write_llm, write_run

from vlm.apps.web.app import RunningPage, WebOptions, serve
from vlm.apps.web.models import ModelStore, find_exports
from vlm.apps.web.texts import LANGUAGES, tell
from vlm.export.run import export_run
from vlm.generation.generate import GenerationSettings, generate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]
WAIT = 60_000  # milliseconds; two busy cores
PACE = 0.05  # seconds between two tokens of an endless answer
LEAK = re.compile(r"0x[0-9a-f]{4}|/(tmp|home|root|srv)/|Traceback|PIL|\.py")
SENTENCE = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    write_llm(root / "llm", max_positions=100_000)
    for seed, name in enumerate(("first", "second"), 1):
        write_run(root / "runs" / name, model_config(root), seed=seed)
        export_run(root / "runs" / name)
    for seed, name in enumerate(("cat.png", "dog.png", "example.png"), 1):
        write_image(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[RunningPage]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # what `serve` sets is undone at the end
        models = ModelStore(find_exports(None, root / "runs"), device="cpu")
        options = WebOptions(
            port=0,
            max_file_mb=20,
            settings=GenerationSettings(max_new_tokens=12),
            examples=(("Which animal?", root / "example.png"), ("Hello there", None)),
        )
        running = serve(models, options)
        yield running
        running.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def endless_answers() -> Iterator[None]:
    """Answers that begin here go on until they are stopped: 90,000 tokens at this pace take longer than a test may."""

    def write(
        model: Any, input_ids: Any, pixels: Any, stop_ids: Any, settings: Any, on_token: Any, is_over: Any
    ) -> Any:
        def slowly(token: int) -> bool:
            time.sleep(PACE)
            return on_token(token)

        return generate(model, input_ids, pixels, (), replace(settings, max_new_tokens=90_000), slowly, is_over)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.inference.load.generate", write)
        yield


class Page:
    """A user in a browser of their own."""

    def __init__(self, chromium: Any, url: str, **context: Any) -> None:
        self.context = chromium.new_context(**({"locale": "en-US"} | context))
        self.context.set_default_timeout(WAIT)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.url = url
        self._open_tab()
        self.open()

    def _open_tab(self) -> None:
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def begin_anew(self) -> None:
        """As somebody who was never here, in the same tab."""
        for tab in self.context.pages:
            if tab is not self.page:
                tab.close()
        if self.page.is_closed():
            self._open_tab()
        else:
            self.page.unroute_all()
            self.page.evaluate("localStorage.clear()")
        self.context.clear_cookies()
        self.requests.clear()
        self.problems.clear()
        self.open()

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector("#box textarea:not([placeholder=''])")
        self.page.wait_for_function("document.documentElement.dataset.started === 'yes'")

    def add(self, *files: Path | dict[str, Any]) -> None:
        self.page.set_input_files("#box input[type=file]", list(files))

    def attach(self, *files: Path) -> None:
        """Add images and wait until they are there."""
        self.add(*files)
        self.page.wait_for_function(f"document.querySelectorAll('#box img').length === {len(files)}")

    def type(self, text: str) -> None:
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")

    def ask(self, text: str, *files: Path) -> str:
        before = len(self.stats())
        if files:
            self.attach(*files)
        self.type(text)
        self.answered(before + 1)
        return self.stats()[-1]

    def answered(self, count: int) -> None:
        """Wait for the n-th answer to be complete and the box to be ready."""
        self.page.wait_for_function(f"document.querySelectorAll('#chat .stats').length === {count}")
        self.ready()

    @contextmanager
    def another_answer(self, count: int) -> Iterator[None]:
        """What is done here has the last of so many answers written anew. Waits for it, not for the one before."""
        last = "[...document.querySelectorAll('#chat .stats')].at(-1)"
        self.page.evaluate(f"{last}.dataset.before = 'yes'")
        yield
        self.page.wait_for_function(f"{last} && {last}.dataset.before !== 'yes'")
        self.answered(count)

    def ready(self) -> None:
        self.page.wait_for_selector("#box button[data-name=Submit]")

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what only a question to the page tells."""
        end = time.monotonic() + WAIT / 1000
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            self.page.wait_for_timeout(50)

    def see_it_grow(self) -> None:
        """Wait until an answer that is written was seen as three texts: words, not what stands there before them."""
        before = {tell(language, text) for language in LANGUAGES for text in ("reading", "waiting")}
        seen: set[str] = set()

        def is_enough() -> bool:
            text = self.page.locator("#chat [data-testid=bot]").last.inner_text().strip()
            if text and text not in before:
                seen.add(text)
            return len(seen) >= 3

        self.page.wait_for_selector("#box button[data-name=Stop]")
        self.until(is_enough)

    def click(self, name: str, nth: int = -1) -> None:
        buttons = self.page.locator(f"#chat button[data-name='{name}']:visible")
        buttons.nth(nth if nth >= 0 else buttons.count() - 1).click()

    def stats(self) -> list[str]:
        return self.page.locator("#chat .stats").all_inner_texts()

    def questions(self) -> list[str]:
        texts = self.page.locator("#chat [data-testid=user] .md, #chat [data-testid=user] .prose").all_inner_texts()
        return list(dict.fromkeys(text.strip() for text in texts))

    def images(self) -> list[str]:
        return [image.get_attribute("src") for image in self.page.locator("#chat img").all()]

    def toast(self) -> str:
        self.page.wait_for_selector(".toast-text, .toast-body")
        return self.page.locator(".toast-body").first.inner_text()

    def notice(self) -> str:
        """Why the page refused something; waits for it."""
        self.page.wait_for_selector("#notice [role=alert]")
        return self.page.inner_text("#notice")

    def set_length(self, tokens: int) -> None:
        self.page.locator("#set-max_new_tokens input[type=number]").evaluate(
            "(input, value) => { input.value = value;"
            " for (const name of ['input', 'change', 'blur']) input.dispatchEvent(new Event(name)); }",
            tokens,
        )

    def open_panel(self) -> None:
        if self.page.locator("#panel.open").count() == 0:
            self.page.click("#panel .toggle-button")
            self.page.wait_for_selector("#panel.open")

    def close(self) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def known_page(chromium: Any, running: RunningPage) -> Iterator[Page]:
    """Opens in a third of the time from the second time on, as the tab keeps the scripts and what they compile to."""
    page = Page(chromium, running.url)
    yield page
    page.close()


@pytest.fixture
def visit(chromium: Any, running: RunningPage, known_page: Page) -> Iterator[Callable[..., Page]]:
    """Somebody new comes: in the known tab, or in a browser of their own who come second or say what kind it is."""
    pages: list[Page] = []

    def visit(**context: Any) -> Page:
        is_own = bool(pages or context)
        pages.append(Page(chromium, running.url, **context) if is_own else known_page)
        if not is_own:
            known_page.begin_anew()
        return pages[-1]

    yield visit
    for page in pages:
        if page is not known_page:
            page.close()
