"""CSV and TSV as they are met: stray quotes, long cells, no quoting at all."""

from __future__ import annotations

import pytest

from vlm.data.index import open_index
from vlm.errors import RecordError

STRAY = 'image{0}caption\na.png{0}"tall one\na.png{0}some thing\na.png{0}other\na.png{0}a 5"\na.png{0}last\n'


def read(tmp_path, name: str, text: str) -> list:
    (tmp_path / name).write_text(text, encoding="utf-8")
    index = open_index(tmp_path / name, tmp_path / "cache")
    found = []
    for number in range(len(index)):
        try:
            found.append(list(index[number].values()))
        except RecordError as error:
            found.append(f"{error.rule}: {error.message}")
    return found


def test_a_tsv_file_has_no_quoting(tmp_path):
    assert read(tmp_path, "a.tsv", STRAY.format("\t")) == [
        ["a.png", '"tall one'], ["a.png", "some thing"], ["a.png", "other"], ["a.png", 'a 5"'], ["a.png", "last"],
    ]  # fmt: skip


def test_of_one_column_no_rows_are_joined(tmp_path):
    assert read(tmp_path, "a.tsv", 'text\n"one\ntwo\n5"\n') == [['"one'], ["two"], ['5"']]


def test_cells_of_a_tsv_file_that_a_program_quoted_are_read_as_meant(tmp_path):
    text = 'image\tcaption\na.png\t"A ""red"",\nround thing"\nb.png\t"whole"\n'
    assert read(tmp_path, "a.tsv", text) == [["a.png", 'A "red",\nround thing'], ["b.png", '"whole"']]
    text = '"image"\t"caption"\n"a.png"\t"Red."\n'  # all in quotes, header and cells
    assert read(tmp_path, "b.tsv", text) == [["a.png", "Red."]]


def test_rows_that_a_stray_quote_joins_are_reported_with_their_number(tmp_path):
    first, last = read(tmp_path, "a.csv", STRAY.format(","))
    assert first.startswith("bad_csv: a cell in quotes takes 4 lines, each of which could be a row")
    assert last == ["a.png", "last"]
    text = 'q,a\nWhat?,"5\nWhere?,there\nWhen?,6"\n'  # without images
    assert read(tmp_path, "b.csv", text)[0].startswith("bad_csv: a cell in quotes takes 3 lines")
    text = 'image,caption\n"a.png,tall\nb.png,5"\nc.png,x\n'
    assert "joins 2 lines" in read(tmp_path, "c.csv", text)[0]


@pytest.mark.parametrize(
    "cell",
    ["Two\nlines", "a\u2028b,c\u2028d,e", "One, two,\nthree", "a\nb\nc", 'She said, "Hi"\nand left, "so"\nto say'],
)
def test_cells_of_several_lines_are_read(tmp_path, cell):
    quoted = cell.replace('"', '""')
    assert read(tmp_path, "a.csv", f'image,caption\na.png,"{quoted}"\n') == [["a.png", cell]]


def test_a_cell_of_150_000_letters_is_read(tmp_path):
    assert read(tmp_path, "a.csv", "text,x\n" + "y" * 150_000 + ",1\n") == [["y" * 150_000, "1"]]
