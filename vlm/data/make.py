"""`vlm data make`: question-answer pairs about a folder of images, asked of a model behind an OpenAI-compatible API."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.batch import Skip
from vlm.data.folder import image_names
from vlm.data.images import load_image
from vlm.data.skips import counts_by_rule
from vlm.errors import ConfigError, DataError, RecordError, VLMError
from vlm.logs import Progress, log

if TYPE_CHECKING:
    import httpx

PROMPT = """Look at the image and write {pairs} questions that a person might ask about it, each with its answer.

Ask about what can be seen: objects, their colours and number, what happens, where it is, text in the image. Ask nothing
that the image does not answer. Answer each in one to three sentences.

Reply with JSON and nothing else: {"pairs": [{"question": "...", "answer": "..."}]}
"""
_MOST_IN_A_ROW = 20  # images without a usable answer, before it is the prompt or the model that is wrong
_TRIES = 3  # of a request that a busy or failing server has not answered
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class MakeSettings:
    """How to ask."""

    api_base: str  # http://host:port/v1
    model: str | None = None  # None asks the server which it has
    key: str | None = None  # sent as a bearer token
    pairs: int = 3  # questions about each image
    max_requests: int = 100  # of this start, tries included
    max_tokens: int = 1000  # of an answer
    max_side: int = 1024  # pixels of the longer side of what is sent
    parallel: int = 4  # requests at once
    has_form: bool = True  # send a JSON schema, to which the server holds the answer
    temperature: float = 0.7
    timeout: float = 120.0  # seconds
    most_letters: tuple[int, int] = (400, 2000)  # of a question and of an answer, in the schema


@dataclass
class Made:
    """What became of the images."""

    num_images: int
    num_before: int = 0  # done by earlier starts, skipped ones included
    num_written: int = 0
    num_pairs: int = 0
    num_requests: int = 0
    skips: list[Skip] = field(default_factory=list)
    is_spent: bool = False  # the budget of requests was, before all images were done

    def lines(self) -> Iterator[str]:
        counts = counts_by_rule(Counter(skip.rule for skip in self.skips)) or "none"
        yield (
            f"{self.num_images:,} images, {self.num_before:,} done before, {self.num_written:,} records with "
            f"{self.num_pairs:,} pairs made by {self.num_requests:,} requests, skipped: {counts}"
        )
        if self.is_spent:
            left = self.num_images - self.num_before - self.num_written - len(self.skips)
            yield f"{left:,} images are left, as --max-requests is spent: the same command goes on"


def make_records(
    images: Path, out: Path, prompt_file: Path, settings: MakeSettings, client: httpx.Client | None = None
) -> Made:
    """Ask about every image below a folder that `out` does not have yet, and append a LLaVA record for each.

    Images are named by their path below `images`. Those that give no record go to `out`.skipped.jsonl with their rule,
    and are not asked about again while they stand there.

    Args:
        prompt_file: what is asked; written with `PROMPT` where it is not there. `{pairs}` in it becomes their number.
        client: of tests; None makes one.

    Raises:
        ConfigError: no image, a file that is not ours, an address or a model that does not answer.
        DataError: many images in a row gave no usable answer.
        VLMError: the server stopped answering. What was made is kept.
    """
    import httpx

    names, _ = image_names(images)
    if not names:
        raise ConfigError(f"{images} holds no images")
    skipped = out.with_name(f"{out.name}.skipped.jsonl")
    done = _done(out) | _done(skipped)
    made = Made(len(names), len(done & {*names}))
    asked = _prompt(prompt_file, settings.pairs)
    waiting = [name for name in sorted(names) if name not in done]
    if not waiting:
        return made
    headers = {} if settings.key is None else {"Authorization": f"Bearer {settings.key}"}
    with client or httpx.Client(headers=headers, timeout=settings.timeout) as http:
        teacher = _Teacher(http, settings, asked)
        teacher.find_model()
        log(f"data: asking {teacher.model} at {settings.api_base} about {len(waiting):,} images")
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file, skipped.open("a", encoding="utf-8") as skip_file:
            try:
                for name, answer in _answers(teacher, images, waiting, made):
                    _write(name, answer, made, file, skip_file)
            finally:
                made.num_requests = teacher.num_requests
    if not skipped.stat().st_size:
        skipped.unlink()
    return made


class _Spent(Exception):
    """The budget of requests is spent."""


@dataclass
class _Teacher:
    """The model that is asked. Used by several threads."""

    http: httpx.Client
    settings: MakeSettings
    prompt: str
    model: str = ""
    num_requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find_model(self) -> None:
        """Raises ConfigError: the server cannot be reached, or names no model."""
        import httpx

        address = f"{self.settings.api_base.rstrip('/')}/models"
        try:
            reply = self.http.get(address)
            names = [entry["id"] for entry in reply.json()["data"]] if reply.status_code == 200 else None
        except httpx.HTTPError as error:
            raise ConfigError(
                f"--api-base {self.settings.api_base}: no answer ({error}). Is the server running there? "
                "`vlm serve EXPORT` starts one at http://127.0.0.1:8000/v1"
            ) from None
        except (ValueError, KeyError, TypeError):
            names = None
        if reply.status_code in (401, 403):
            raise ConfigError(
                f"{address}: refused ({reply.status_code}). Name the variable of its key: --api-key-env NAME"
            )
        if self.settings.model is None and not names:
            raise ConfigError(
                f"{address} names no model (status {reply.status_code}): give one with --model, "
                "and an address that ends with /v1"
            )
        if self.settings.model is not None and names and self.settings.model not in names:
            raise ConfigError(f"--model {self.settings.model}: {address} has {', '.join(map(str, names[:8]))}")
        self.model = self.settings.model or str(names and names[0])

    def ask(self, image: Path) -> list[tuple[str, str]]:
        """Questions and answers about an image.

        Raises:
            RecordError: rules request_refused, cut_off, not_json, no_pairs, and those of `load_image`.
            _Spent, VLMError.
        """
        reply = self._send(self._body(image))
        try:
            choice = reply["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError):
            raise RecordError("not_json", f"the reply has no choices[0].message.content: {str(reply)[:100]}") from None
        try:
            return read_pairs(text)
        except RecordError as error:
            if reason == "length":
                raise RecordError(
                    "cut_off", f"the answer ended at {self.settings.max_tokens} tokens; --max-tokens"
                ) from None
            raise error

    def _body(self, image: Path) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": encode_image(image, self.settings.max_side)}},
            {"type": "text", "text": self.prompt},
        ]
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": content}],
            "max_tokens": self.settings.max_tokens, "temperature": self.settings.temperature,
        }  # fmt: skip
        if self.settings.has_form:
            schema = _schema(self.settings)
            form = {"name": "pairs", "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    def _send(self, body: dict[str, Any]) -> Any:
        import httpx

        address, problem = f"{self.settings.api_base.rstrip('/')}/chat/completions", ""
        for tried in range(_TRIES):
            self._count()
            try:
                reply = self.http.post(address, json=body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code == 200:
                    try:
                        return reply.json()
                    except ValueError:
                        raise RecordError("not_json", f"the reply is not JSON: {reply.text[:80]!r}") from None
                problem = f"status {reply.status_code}: {reply.text[:200]}"
                if reply.status_code not in _BUSY:
                    raise RecordError("request_refused", problem)
            if tried < _TRIES - 1:
                time.sleep(2.0**tried)
        raise VLMError(f"{address}: {problem}, {_TRIES} times. What was made is kept; the same command goes on")

    def _count(self) -> None:
        with self._lock:
            if self.num_requests >= self.settings.max_requests:
                raise _Spent
            self.num_requests += 1


def read_pairs(text: Any) -> list[tuple[str, str]]:
    """The pairs of an answer: its first JSON list of objects, whatever stands around it.

    Raises:
        RecordError: rules not_json, no_pairs, repeated_question.

    >>> read_pairs('Here: ```json\\n[{"question": "What?", "answer": "A dog."}]\\n```')
    [('What?', 'A dog.')]
    """
    found = _first_list(text) if isinstance(text, str) else None
    if found is None:
        raise RecordError("not_json", f"no JSON list in the answer: {str(text)[:80]!r}")
    pairs = []
    for entry in found:
        pair = [entry.get(key) for key in ("question", "answer")] if isinstance(entry, dict) else [None, None]
        if not all(isinstance(said, str) and said.strip() for said in pair):
            raise RecordError("no_pairs", f"an entry is not a question and its answer: {str(entry)[:80]}")
        question, answer = (str(said).strip().replace("<image>", "< image>") for said in pair)
        pairs.append((question, answer))
    if not pairs:
        raise RecordError("no_pairs", "the list is empty")
    if len({question for question, _ in pairs}) < len(pairs):
        raise RecordError("repeated_question", f"one question twice: {pairs[0][0][:60]!r}")
    return pairs


def encode_image(path: Path, max_side: int) -> str:
    """A JPEG of at most `max_side` pixels a side as a data: URL. What the file says of camera and place is left out."""
    image = load_image(path)
    image.thumbnail((max_side, max_side))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _first_list(text: str) -> list[Any] | None:
    start = text.find("[")
    while start >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            found = [0]
        if all(isinstance(entry, dict) for entry in found):
            return found
        start = text.find("[", start + 1)
    return None


def _schema(settings: MakeSettings) -> dict[str, Any]:
    questions, answers = ({"type": "string", "minLength": 1, "maxLength": most} for most in settings.most_letters)
    entry = {
        "type": "object", "properties": {"question": questions, "answer": answers},
        "required": ["question", "answer"], "additionalProperties": False,
    }  # fmt: skip
    pairs = {"type": "array", "items": entry, "minItems": 1, "maxItems": settings.pairs}
    return {"type": "object", "properties": {"pairs": pairs}, "required": ["pairs"], "additionalProperties": False}


def _prompt(path: Path, pairs: int) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROMPT, encoding="utf-8")
        log(f"data: wrote {path}: what is asked about each image, to be edited")
    return path.read_text(encoding="utf-8").replace("{pairs}", str(pairs))


def _done(path: Path) -> set[str]:
    """Names of the images in a file of an earlier start. A line that a kill tore is taken away."""
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        names = {json.loads(line)["image"] for line in whole.split(b"\n")[:-1]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} holds lines that are no records of `vlm data make`; name another file") from None
    if whole != raw:
        path.write_bytes(whole)
    return names


def _answers(
    teacher: _Teacher, folder: Path, names: Sequence[str], made: Made
) -> Iterator[tuple[str, list[tuple[str, str]] | RecordError]]:
    """Of each image in order, as far as the budget goes. `parallel` requests are under way at once."""
    left, running = iter(names), list[tuple[str, Future[list[tuple[str, str]]]]]()
    with (
        ThreadPoolExecutor(teacher.settings.parallel) as pool,
        Progress("data: asked about", len(names), "images", tells_rate=True) as progress,
    ):
        for number in range(len(names)):
            while len(running) < teacher.settings.parallel and (name := next(left, None)) is not None:
                running.append((name, pool.submit(teacher.ask, folder / name)))
            name, future = running.pop(0)
            progress.show(number)
            try:
                yield name, future.result()
            except RecordError as error:
                yield name, error
            except _Spent:
                made.is_spent = True
                left = iter(())
            if not running and made.is_spent:
                return


def _write(name: str, answer: list[tuple[str, str]] | RecordError, made: Made, file: Any, skip_file: Any) -> None:
    """One line, at once on the disk's side of this process. Raises DataError after many images without an answer."""
    if isinstance(answer, RecordError):
        made.skips.append(Skip(answer.rule, name, answer.message))
        skip_file.write(json.dumps({"image": name, "rule": answer.rule, "message": answer.message}) + "\n")
        skip_file.flush()
        if len(made.skips) >= _MOST_IN_A_ROW and not made.num_written:
            raise DataError(
                f"none of the first {len(made.skips)} answers could be used "
                f"({counts_by_rule(Counter(skip.rule for skip in made.skips))}), the last: {answer.message}. Edit "
                f"the prompt, ask another --model, and remove {skip_file.name} to ask about these again"
            )
        return
    turns = []
    for number, (question, reply) in enumerate(answer):
        mark = "" if number else "<image>\n"
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": reply}]
    file.write(json.dumps({"image": name, "conversations": turns}, ensure_ascii=False) + "\n")
    file.flush()
    made.num_written += 1
    made.num_pairs += len(answer)
