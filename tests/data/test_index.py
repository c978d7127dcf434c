"""Data files as they are met (rows 32 and 33 of the faults): each bad record costs itself and says where it stands."""

from __future__ import annotations

import csv
import gzip
import io
import json
import mmap
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm.data import index as index_module
from vlm.data.index import open_index
from vlm.data.spans import find_json_array, find_lines, find_rows
from vlm.errors import DataError, RecordError
from vlm.files import sha256

DEEP = b"[" * 100_000 + b"]" * 100_000
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # too_slow: a busy machine
)


def write(tmp_path, name: str, content: bytes):
    path = tmp_path / name
    path.write_bytes(content)
    return open_index(path, tmp_path / "cache")


def read_all(index) -> list:
    """Each record, or the rule that it breaks."""
    return [read(index, number) for number in range(len(index))]


def read(index, number: int) -> dict | str:
    try:
        return index[number]
    except RecordError as error:
        named, rule = error.where, error.rule
    assert named == index.where(number)
    return rule


# What one bad line of JSONL, or one bad element of a list, is reported as. The records round it must load.
BAD_RECORDS = {
    "half": (b'{"id": ', "bad_json"),
    "word": (b"nothing", "bad_json"),
    "nan": (b'{"id": NaN}', "bad_json"),
    "infinity": (b'{"id": -Infinity}', "bad_json"),
    "repeated key": (b'{"id": 1, "id": 2}', "duplicate_key"),
    "repeated key inside": (b'{"id": {"x": 1, "x": 1}}', "duplicate_key"),
    "100k brackets": (b'{"id": ' + DEEP + b"}", "bad_json"),
    "100k open brackets": (b'{"id": ' + b"[" * 100_000, "bad_json"),
    "only open brackets": (b"[" * 100_000, "bad_json"),
    "5000 digits": (b'{"id": ' + b"7" * 5000 + b"}", "bad_json"),
    "not utf-8": (b'{"id": "\xff\xfe"}', "bad_json"),
    "a list": (b"[1, 2]", "not_an_object"),
    "a number": (b"17", "not_an_object"),
    "a text": (b'"{ [ text"', "not_an_object"),
    "wrong bracket": (b'{"id": [}', "bad_json"),
    "missing bracket": (b'{"id": {"x": 1}', "bad_json"),
    "missing quote": (b'{"id": "x}', "bad_json"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_line_of_jsonl_costs_itself(tmp_path, name):
    bad, rule = BAD_RECORDS[name]
    index = write(tmp_path, "a.jsonl", b'{"id": 1}\n' + bad + b'\n{"id": 3}\n')
    assert read_all(index) == [{"id": 1}, rule, {"id": 3}]
    with pytest.raises(RecordError, match=r"^a\.jsonl: line 2: "):
        index[1]


@pytest.mark.parametrize(
    ("name", "gap"),
    # a missing quote on the only line is the next test but one
    [(name, gap) for name in BAD_RECORDS for gap in (b",\n", b", ") if (name, gap) != ("missing quote", b", ")],
)
def test_a_bad_element_of_a_json_list_costs_itself(tmp_path, name, gap):
    bad, rule = BAD_RECORDS[name]
    index = write(tmp_path, "a.json", b"[" + gap.join([b'{"id": 1}', bad, b'{"id": 3}']) + b"]")
    assert read_all(index) == [{"id": 1}, rule, {"id": 3}]
    with pytest.raises(RecordError, match=r"^a\.json: record 2: "):
        index[1]


def test_without_the_second_look_a_missing_bracket_would_cost_all_that_follows(tmp_path, monkeypatch):
    """The guard of the test above is the search for the next record's beginning."""
    monkeypatch.setattr("vlm.data.spans._signature", lambda text, start: b"")
    assert read_all(write(tmp_path, "a.json", b'[{"id": 1}, {"id": {"x": 1}, {"id": 3}, {"id": 4}]')) == [
        {"id": 1},
        "bad_json",
    ]


def test_a_missing_quote_on_the_only_line_is_still_reported(tmp_path):
    """Nothing tells where such a text ends, so it takes records along; it is one skip, not silence."""
    found = read_all(write(tmp_path, "a.json", b'[{"id": 1}, {"id": "x}, {"id": 3}]'))
    assert found[0] == {"id": 1}
    assert "bad_json" in found[1:]


def test_a_list_is_read_whatever_its_layout_brackets_and_quotes_inside_texts(tmp_path):
    records = [
        {"id": 1, "turns": [{"from": "human", "value": 'say "[{" \\'}, {"from": "gpt", "value": "]}\n"}]},
        {},
        {"id": 2, "x": [[], [{}]]},
    ]
    for indent in (None, 0, 2):
        index = write(tmp_path, f"{indent}.json", json.dumps(records, indent=indent).encode())
        assert read_all(index) == records


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'[{"a": 1}, {"a": 2', [{"a": 1}, "bad_json"]),  # cut off inside a record
        (b'[{"a": 1}, ', [{"a": 1}, "bad_json"]),  # between two
        (b'[{"a": 1}', [{"a": 1}, "bad_json"]),
        (b'[{"a": 1}] [{"a": 2}]', [{"a": 1}, "bad_json"]),  # two lists in one file
        (b'[{"a": 1}], {"a": 2}]', [{"a": 1}, "bad_json"]),
        (b'[{"a": 1}, }, {"a": 2}]', [{"a": 1}, "bad_json", {"a": 2}]),
        (b'[{"a": 1}, what is this {"a": 2}]', [{"a": 1}, "bad_json", {"a": 2}]),
    ],
)
def test_nothing_at_the_edges_of_a_list_is_lost_in_silence(tmp_path, text, expected):
    assert read_all(write(tmp_path, "a.json", text)) == expected


def test_a_list_that_was_cut_off_between_records_says_so(tmp_path):
    with pytest.raises(RecordError, match=r"^a\.json: record 2: the list is not closed: the file was cut off here$"):
        write(tmp_path, "a.json", b'[{"a": 1},\n')[1]


def test_line_numbers_count_blank_lines(tmp_path):
    index = write(tmp_path, "a.jsonl", b'\n{"id": 1}\n\r\n  \n{"id": 2}')
    assert [index.where(0), index.where(1)] == ["a.jsonl: line 2", "a.jsonl: line 5"]
    assert read_all(index) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id": "\xe7\x8b\x97"}\n'),
        ("a.json", b'[{"id": 1},\n {"id": "\xe7\x8b\x97"}]'),
        ("a.csv", b"id,x\n1,y\n\xe7\x8b\x97,z\n"),
        ("a.tsv", b"id\tx\n1\ty\n\xe7\x8b\x97\tz\n"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "bom", "crlf", "gz", "bom crlf gz"])
def test_byte_order_marks_line_ends_and_gzip_change_nothing(tmp_path, name, text, form):
    expected = read_all(write(tmp_path, name, text))
    assert [str(record["id"]) for record in expected] == ["1", "狗"]
    if "crlf" in form:
        text = text.replace(b"\n", b"\r\n")
    if "bom" in form:
        text = b"\xef\xbb\xbf" + text
    if "gz" in form:
        name, text = name + ".gz", gzip.compress(text, mtime=0)
    (tmp_path / "second").mkdir()
    index = write(tmp_path / "second", name, text)
    assert read_all(index) == expected
    assert index.where(0).startswith(f"{name}: ")  # not the name of the unpacked file


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"", "is empty"),
        ("a.json", b"\xef\xbb\xbf \n", "is empty"),
        ("a.json", b'{"id": 1}\n{"id": 2}', "one object per line must be named .jsonl"),
        ("a.json", b"<html>", "is not a JSON list: it begins with b'<'"),
        ("a.json", "[]".encode("utf-16"), "is UTF-16; expected UTF-8"),
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "expected a header line"),
        ("a.csv", b"image,image\na,b\n", "a column name stands twice"),
        ("a.csv", b"im\xffage,caption\na,b\n", "the header line is not a row of UTF-8"),
        ("a.parquet", b"PAR1", "unknown ending '.parquet'; known: .json .jsonl .csv .tsv"),
        ("a.jsonl.gz", b"no gzip", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}' * 999, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}' * 999, mtime=0)[:40] + b"\0" * 40, "is not a whole gzip file"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused_with_its_reason(tmp_path, name, content, said):
    with pytest.raises(DataError) as caught:
        write(tmp_path, name, content)
    assert said in str(caught.value)
    assert not isinstance(caught.value, RecordError)
    assert not list((tmp_path / "cache").glob("unpacked/*"))  # no half-unpacked file stays


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "b.json").mkdir()
    for name in ("a.json", "b.json"):
        with pytest.raises(DataError, match="does not exist"):
            open_index(tmp_path / name, tmp_path)


def test_tables_may_hold_line_ends_and_delimiters_in_quotes(tmp_path):
    text = (
        b'image,caption\na.png,"two\nlines, ""quoted"""\n\nb.png,5" screen\nc.png\nd.png,x,y\ne.png,"open\nf.png,last'
    )
    index = write(tmp_path, "a.csv", text)
    assert read_all(index) == [
        {"image": "a.png", "caption": 'two\nlines, "quoted"'},
        {"image": "b.png", "caption": '5" screen'},
        "bad_columns",
        "bad_columns",
        "bad_csv",  # the quote that is never closed costs its own line
        {"image": "f.png", "caption": "last"},
    ]
    assert [index.where(i) for i in (0, 1, 5)] == ["a.csv: line 2", "a.csv: line 5", "a.csv: line 9"]


def test_a_record_that_swallowed_others_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_RECORD_BYTES", 1 << 20)
    index = write(tmp_path, "a.jsonl", b'{"id": 1}\n{"id": "' + b"x" * (1 << 20) + b'"}\n')
    assert read_all(index) == [{"id": 1}, "record_too_large"]


def generated(suffix: str, count: int) -> Iterator[str]:
    """The text of a file of `count` records; of JSON they are like LLaVA's."""
    opening, between, closing = {"json": ("[", ",\n", "]"), "jsonl": ("", "\n", ""), "csv": ("id,x\n", "\n", "")}[
        suffix
    ]
    turns = '[{"from":"human","value":"<image>\\nWhat is it?"},{"from":"gpt","value":"%s"}]'
    yield opening
    for number in range(count):
        yield between if number else ""
        if suffix == "csv":
            yield f'{number},"a\nb"'
        else:
            yield f'{{"id":{number},"image":"{number}.jpg","conversations":{turns % ("x" * (number % 90))}}}'
    yield closing


def owner_of(array):
    """What holds the memory of an array."""
    return owner_of(array.base) if isinstance(array, np.ndarray) else array


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_memory_stays_flat_with_50_000_records(tmp_path, suffix):
    """Measured: 1.6 MB while scanning (24 bytes a record and the growing of the array), 4 KB once indexed.

    As Python objects the records of the JSON file take 50 MB.
    """
    count, path = 50_000, tmp_path / f"a.{suffix}"
    with path.open("w") as file:
        file.writelines(generated(suffix, count))
    tracemalloc.start()
    try:
        index = open_index(path, tmp_path / "cache")
        held, scanning = tracemalloc.get_traced_memory()
        assert len(index) == count
        assert [str(index[i]["id"]) for i in (0, 1, 37_777, 49_999)] == ["0", "1", "37777", "49999"]
    finally:
        tracemalloc.stop()
    assert scanning < 2.5e6
    assert held < 50e3
    assert isinstance(owner_of(index.spans), mmap.mmap)


def test_one_text_of_20_mb_needs_no_stack():
    """A pattern that can go back takes 2.3 GB and 7 s."""
    program = (
        "import resource; from vlm.data.spans import find_json_array\n"
        'text = b\'[{"id": 1, "x": "\' + b\'a\\\\n\' * 7_000_000 + b\'"}, {"id": 2}]\'\n'
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(list(find_json_array(text, 'a.json'))) == 2\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20  # MB more than the text itself; measured 0


@pytest.mark.slow
def test_many_broken_records_cost_no_more_than_a_few_passes():
    """Every record lacks a bracket, so each look for its end goes to the end of the file: given up in time.

    Measured: 0.5 s. Without a limit it would take hundreds of times as long.
    """
    text = b"[" + b",".join([b'{"id": {"x": 1}'] * 20_000) + b"]"
    spans = list(find_json_array(text, "a.json"))
    assert spans[-1][1] == len(text)
    assert 8 <= len(spans) < 100


def test_an_index_is_cached_by_path_size_and_time(tmp_path, monkeypatch):
    index = write(tmp_path, "a.jsonl", b'{"id": 1}\n')
    stored = list((tmp_path / "cache" / "index").iterdir())
    assert [path.suffix for path in stored] == [".npy"]  # and no temporary file

    def never(text):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "find_lines", never)
        assert read_all(open_index(index.path, tmp_path / "cache")) == [{"id": 1}]
    os.utime(index.path, ns=(1, 1))
    again = open_index(index.path, tmp_path / "cache")
    assert read_all(again) == [{"id": 1}]
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 2
    again.path.write_bytes(b'{"id": 1}\n{"id": 2}\n')
    assert read_all(open_index(index.path, tmp_path / "cache")) == [{"id": 1}, {"id": 2}]


def npy(values: list) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(values))
    return out.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x93NUMPY",
        b"garbage" * 99,
        npy([[0, 10]]),
        npy([[0.0, 10.0, 1.0]]),
        npy([[0, 99, 1]]),
        npy([[-1, 10, 1]]),
    ],
)
def test_a_damaged_cache_file_is_made_anew(tmp_path, damage):
    index = write(tmp_path, "a.jsonl", b'{"id": 1}\n')
    (stored,) = (tmp_path / "cache" / "index").iterdir()
    stored.write_bytes(damage)
    assert read_all(open_index(index.path, tmp_path / "cache")) == [{"id": 1}]
    assert np.load(stored).tolist() == [[0, 10, 1]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_cache_that_cannot_be_written_costs_a_line_in_the_log(tmp_path, capsys, name):
    (tmp_path / "cache").write_text("a file stands where the folder should be")  # permissions do not stop root
    text = b'{"id": 1}\n'
    index = write(tmp_path, name, gzip.compress(text, mtime=0) if name.endswith("gz") else text)
    assert read_all(index) == [{"id": 1}]
    assert "cannot write to" in capsys.readouterr().err
    assert read_all(pickle.loads(pickle.dumps(index))) == [{"id": 1}]


def test_a_worker_gets_the_name_of_the_cache_file_not_its_contents(tmp_path):
    for suffix, header in (("jsonl", b""), ("csv", b"id\n")):
        index = write(tmp_path, f"a.{suffix}", header + b"1\n" * 50_000)
        sent = pickle.dumps(index)
        assert len(sent) < 1000  # measured 560; the spans are 1.2 MB
        assert len(pickle.loads(sent)) == 50_000


def test_a_file_edited_behind_the_index_stops_the_run(tmp_path):
    index = write(tmp_path, "a.jsonl", b'{"id": 1}\n')
    assert read_all(pickle.loads(pickle.dumps(index))) == [{"id": 1}]
    index.path.write_bytes(b'{"xx": 1, "id": 1}\n')
    with pytest.raises(DataError, match="was changed since it was indexed") as caught:
        index[0]
    assert not isinstance(caught.value, RecordError)


PIECES = [
    b'{"a":1}',
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b",",
    b"\n",
    b"\r",
    b"\xef\xbb\xbf",
    b"\xff",
    b"NaN",
    b"\t",
    b"x",
]
TEXTS = st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join))


@FUZZ
@given(text=TEXTS, suffix=st.sampled_from(["json", "jsonl", "csv", "tsv", "json.gz"]), listed=st.booleans())
def test_no_bytes_raise_anything_but_our_errors(tmp_path, text, suffix, listed):
    if listed:
        text = b"[" + text + b"]"
    if suffix == "json.gz":
        text = gzip.compress(text, mtime=0)
    try:
        index = write(tmp_path, f"fuzz.{suffix}", text)
    except DataError:
        return
    assert all(isinstance(found, dict | str) for found in read_all(index))


JSON = st.recursive(
    st.none()
    | st.integers()
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]))
    | st.sampled_from('"[]{}\\\n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@FUZZ
@given(records=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5), data=st.data())
def test_every_list_and_every_jsonl_is_read_back_as_json_reads_it(records, data):
    ascii_only = data.draw(st.booleans())
    text = json.dumps(records, indent=data.draw(st.sampled_from([None, 0, 2])), ensure_ascii=ascii_only).encode(
        "utf-8", "ignore"
    )
    assert [json.loads(text[start:end]) for start, end, _ in find_json_array(text, "a.json")] == json.loads(text)
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records).encode("utf-8", "ignore")
    assert [json.loads(lines[start:end]) for start, end, _ in find_lines(lines)] == json.loads(text)


@FUZZ
@given(
    rows=st.lists(st.lists(st.text(alphabet='ab",\n\r\t;é ', max_size=6), min_size=2, max_size=3), max_size=5),
    delimiter=st.sampled_from([",", "\t"]),
)
def test_every_table_is_read_back_as_csv_reads_it(rows, delimiter):
    if delimiter == "\t":  # a TSV file has no tabs in its cells
        rows = [["x", "y"], *([cell.replace("\t", " ") for cell in row] for row in rows)]
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(rows)
    text = out.getvalue().encode()
    spans = list(find_rows(text, delimiter))
    read = [next(csv.reader(io.StringIO(text[a:b].decode(), newline=""), delimiter=delimiter)) for a, b, _ in spans]
    assert read == rows


def test_the_sum_of_a_file_is_read_once_as_long_as_it_is_the_same_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    before = path.stat()
    digest = open_index(path, tmp_path / "cache").content_digest()
    read = []
    monkeypatch.setattr("vlm.data.index.sha256", lambda file: read.append(file.name) or sha256(file))
    assert (open_index(path, tmp_path / "cache").content_digest(), read) == (digest, [])
    path.write_text('{"text": "b"}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as long and as old as it was
    assert (open_index(path, tmp_path / "cache").content_digest() != digest, read) == (True, ["a.jsonl"])
    for kept in (tmp_path / "cache/index").glob("*.sha256.json"):
        kept.write_text('{"file": 3')
    assert open_index(path, tmp_path / "cache").content_digest() == sha256(path)
