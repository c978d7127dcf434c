"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import io
import re

from vlm.data.media import IMAGE_SUFFIXES
from vlm.data.spans import MAX_RECORD_BYTES
from vlm.errors import RecordError

csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))  # Python's own is 128 KiB, for the whole process
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def parse_row(raw: bytes, delimiter: str, unquotes_all: bool = False) -> list[str]:
    """The cells of one row.

    A CSV file quotes by its rules. A TSV file has no quoting; yet a cell in quotes that needed them (for a quote
    within, doubled, or a line end) was written by a program that quotes, and is read as it meant it.

    Args:
        unquotes_all: TSV: the header stands in quotes, so every cell in quotes is one.

    Raises:
        RecordError: rule bad_csv.
    """
    try:
        text = raw.decode("utf-8")
        if delimiter == "\t":
            return [_tsv_cell(cell, unquotes_all) for cell in text.rstrip("\r\n").split("\t")]
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error, StopIteration) as error:
        raise RecordError("bad_csv", f"not a row of UTF-8 text ({error})") from None


def has_quoted_header(raw: bytes) -> bool:
    """Whether every name in a TSV file's first line stands in quotes: then a program wrote it that quotes all cells.

    >>> has_quoted_header(b'"image"\\t"caption"\\n'), has_quoted_header(b'image\\t"caption"\\n')
    (True, False)
    """
    return all(_QUOTED.fullmatch(cell) for cell in raw.decode("utf-8", "replace").rstrip("\r\n").split("\t"))


def refuse_joined_rows(raw: bytes, delimiter: str, num_columns: int) -> None:
    """Raise RecordError rule bad_csv when a quote that was meant as text has joined rows into one cell.

    The sign: each line of the row, read alone, has the header's number of cells, and the lines after the first name
    image files, or are several, with no doubled quote that would show that a program wrote them.
    """
    lines = [line.decode("utf-8", "replace") for line in raw.strip(b"\r\n").splitlines()]  # bytes: not at U+2028
    if len(lines) < 2 or any(line.count(delimiter) != num_columns - 1 for line in lines):
        return
    later = [cell.strip(' "').lower() for line in lines[1:] for cell in line.split(delimiter)]
    name_files = sum(cell.endswith(IMAGE_SUFFIXES) for cell in later) >= len(lines) - 1
    if name_files or (len(lines) > 2 and num_columns > 1 and b'""' not in raw):
        raise RecordError(
            "bad_csv",
            f"a cell in quotes takes {len(lines)} lines, each of which could be a row, so all of them are left out. A "
            'quote that is text is written twice: ""',
        )


def _tsv_cell(cell: str, unquotes_all: bool) -> str:
    found = _QUOTED.fullmatch(cell)
    if found is None:
        return cell
    needed_quotes = '""' in found[1] or "\n" in found[1] or "\r" in found[1]
    return found[1].replace('""', '"') if needed_quotes or unquotes_all else cell
