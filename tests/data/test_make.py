"""Question-answer pairs asked of a server: what of its answers is kept, skipped and paid for."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import httpx
import pytest
from PIL import Image

from vlm.data import make
from vlm.data.config import SourceConfig
from vlm.data.make import MakeSettings, _done, encode_image, make_records, read_pairs
from vlm.data.parse import parse_record
from vlm.errors import ConfigError, DataError, RecordError, VLMError

GOOD = json.dumps({"pairs": [{"question": "What?", "answer": "A square."}, {"question": "Where?", "answer": "Left."}]})


class Server:
    """Answers each request with the next of its replies: a text, or a status."""

    def __init__(self, *replies: str | int) -> None:
        self.replies = list(replies)
        self.bodies: list[dict] = []
        self.reason = "stop"

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "teacher"}]})
        self.bodies.append(json.loads(request.content))
        reply = self.replies.pop(0)
        if isinstance(reply, int):
            return httpx.Response(reply, text="because")
        choice = {"message": {"content": reply}, "finish_reason": self.reason}
        return httpx.Response(200, json={"choices": [choice]})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "in").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "in/c.png"):
        Image.new("RGB", (64, 32), "red").save(folder / name)
    return folder


def run(images: Path, server: Server, **settings):
    out = images.parent / "pairs.jsonl"
    client = httpx.Client(transport=httpx.MockTransport(server))
    chosen = MakeSettings("http://127.0.0.1:1/v1", **{"parallel": 1} | settings)
    return make_records(images, out, images.parent / "prompt.txt", chosen, client)


def written(images: Path) -> list[dict]:
    return [json.loads(line) for line in (images.parent / "pairs.jsonl").read_text().splitlines()]


def test_each_image_becomes_a_record_that_trains(images):
    server = Server(GOOD, GOOD, GOOD)
    made = run(images, server, pairs=2)
    assert [record["image"] for record in written(images)] == ["a.png", "b.jpg", "in/c.png"]
    conversation = parse_record(written(images)[0], SourceConfig(path="x.json"))
    assert [turn.text for turn in conversation.turns] == ["\nWhat?", "A square.", "Where?", "Left."]
    assert conversation.images == ("a.png",)
    assert (made.num_written, made.num_pairs, made.num_requests) == (3, 6, 3)
    image, text = server.bodies[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "write 2 questions" in text["text"]
    assert server.bodies[0]["model"] == "teacher"


def test_the_prompt_is_a_file_to_edit(images):
    prompt = images.parent / "prompt.txt"
    prompt.write_text('Ask {pairs} things, as {"pairs": []}.')
    server = Server(GOOD, GOOD, GOOD)
    run(images, server, pairs=5)
    assert server.bodies[0]["messages"][0]["content"][1]["text"] == 'Ask 5 things, as {"pairs": []}.'


def test_a_budget_ends_it_and_the_same_command_goes_on(images):
    made = run(images, Server(GOOD), max_requests=1)
    assert [*made.lines()][1] == "2 images are left, as --max-requests is spent: the same command goes on"
    with (images.parent / "pairs.jsonl").open("a") as file:
        file.write('{"image": "b.jpg", "conv')  # a kill in the middle of a line
    server = Server("I see a dog.", GOOD)
    made = run(images, server, max_requests=9)
    assert (made.num_before, made.num_written, [skip.rule for skip in made.skips]) == (1, 1, ["not_json"])
    assert [record["image"] for record in written(images)] == ["a.png", "in/c.png"]
    again = Server()
    assert (run(images, again).num_before, again.bodies) == (3, [])


def test_bad_answers_are_skipped_by_a_rule(images):
    made = run(images, Server('{"pairs": [{"question": "What?"}]}', 400, GOOD))
    assert Counter(skip.rule for skip in made.skips) == {"no_pairs": 1, "request_refused": 1}
    listed = [json.loads(line) for line in (images.parent / "pairs.jsonl.skipped.jsonl").read_text().splitlines()]
    assert [entry["image"] for entry in listed] == ["a.png", "b.jpg"]
    assert [*made.lines()] == [
        "3 images, 0 done before, 1 records with 2 pairs made by 3 requests, skipped: no_pairs 1, request_refused 1"
    ]


def test_a_busy_server_is_asked_again_and_every_try_is_counted(images, monkeypatch):
    monkeypatch.setattr(make.time, "sleep", lambda seconds: None)
    assert run(images, Server(429, GOOD, 503, 503, GOOD, GOOD)).num_requests == 6
    (images / "d.png").write_bytes((images / "a.png").read_bytes())
    with pytest.raises(VLMError, match=r"status 503: because, 3 times\. What was made is kept"):
        run(images, Server(503, 503, 503))


def test_a_model_that_never_answers_right_is_given_up(images, monkeypatch):
    monkeypatch.setattr(make, "_MOST_IN_A_ROW", 2)
    server = Server("no", "no", "no")
    server.reason = "length"
    with pytest.raises(DataError, match=r"none of the first 2 answers could be used \(cut_off 2\)"):
        run(images, server)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[]", "no_pairs"),
        ("see [1] and [2]", "not_json"),
        (None, "not_json"),
        ('[{"question": "A?", "answer": ""}]', "no_pairs"),
        ('[{"question": "A?", "answer": "b"}, {"question": "A?", "answer": "c"}]', "repeated_question"),
    ],
)
def test_what_is_no_pairs_has_a_name(text, rule):
    with pytest.raises(RecordError) as caught:
        read_pairs(text)
    assert caught.value.rule == rule


def test_words_around_the_list_and_marks_in_it_do_no_harm():
    assert read_pairs('As in [1]: [{"question": "<image> A?", "answer": "b"}] done') == [("< image> A?", "b")]


def test_images_are_sent_small_and_without_what_the_camera_wrote(images):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    Image.new("RGB", (300, 200)).save(images / "big.jpg", exif=exif)
    raw = base64.b64decode(encode_image(images / "big.jpg", 100).partition(",")[2])
    assert Image.open(io.BytesIO(raw)).size == (100, 67)
    assert b"a camera" not in raw


def test_what_is_done_is_read_by_lines_of_json_and_a_torn_one_goes(tmp_path):
    lines = [
        json.dumps({"image": name, "answer": "a\u2028b"}, ensure_ascii=False) + "\n" for name in ("1.png", "2.png")
    ]
    (tmp_path / "pairs.jsonl").write_bytes("".join(lines).encode() + b'{"image": "\xe7\x8b')
    assert _done(tmp_path / "pairs.jsonl") == {"1.png", "2.png"}
    assert (tmp_path / "pairs.jsonl").read_text("utf-8") == "".join(lines)


def test_wrong_addresses_models_and_files_are_named(images, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "empty", {}), "holds no images"),
        ((images, {"model": "other"}), "--model other: .* has teacher"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(arguments[0], Server(), **arguments[1])
    with pytest.raises(ConfigError, match=r"--api-base http://127\.0\.0\.1:9/v1: no answer .*vlm serve"):
        make_records(images, tmp_path / "x.jsonl", tmp_path / "p.txt", MakeSettings("http://127.0.0.1:9/v1"))
    (tmp_path / "pairs.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(ConfigError, match="no records of `vlm data make`"):
        run(images, Server())
