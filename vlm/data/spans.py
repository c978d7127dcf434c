"""Finding the records of a mapped file without parsing it: three scanners that never look at one byte for long.

Each yields spans: first byte, one past the last, and the number by which messages name the record. All patterns are
possessive: a JSON string of 20 MB costs a plain pattern 2.3 GB of backtracking stack, and these nothing.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator

from vlm.errors import DataError

MAX_RECORD_BYTES = 64 << 20  # a longer record is not read: it is an unclosed one that swallowed others

Span = tuple[int, int, int]
Text = mmap.mmap | bytes

_MOST_TEXT_BYTES = 16 << 20  # of one document of a .txt file; a longer one is taken for several
_DOCUMENT_END = re.compile(rb"^<\|endoftext\|>[ \t\r]*+(?:\n|\Z)", re.MULTILINE)
_BOM = b"\xef\xbb\xbf"
_STRING = rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"?'  # ends at a raw line end too: a missing quote costs one line
_LINE = re.compile(rb"[^\n]*+\n?")
_BLANK = re.compile(rb"[ \t\r]*+(?:\n|\Z)")
_NEXT_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+[\[\]{}]", re.DOTALL)  # the match ends with it
_SOMETHING = re.compile(rb"[^\s,]")
_LOOSE = re.compile(rb"(?:" + _STRING + rb'|[^"\[\]{,])++|\}', re.DOTALL)
_FIRST_KEY = re.compile(rb'\{\s*+"[^"\\\n]*+"\s*+:')
_OPENING = {ord("]"): ord("["), ord("}"): ord("{")}


def find_lines(text: Text) -> Iterator[Span]:
    """The lines that are not blank, of JSONL."""
    position, number = _after_bom(text), 0
    while position < len(text):
        number += 1
        end = _end(_LINE, text, position)
        if not _BLANK.match(text, position):
            yield position, end, number
        position = end


def find_documents(text: Text) -> Iterator[Span]:
    """The documents of plain text that are not blank: the whole file, or what stands between lines `<|endoftext|>`.

    >>> list(find_documents(b"One.\\nTwo.\\n<|endoftext|>\\nThree.\\n"))
    [(0, 10, 1), (24, 31, 2)]
    """
    position, number = _after_bom(text), 0
    while position < len(text):
        found = _DOCUMENT_END.search(text, position)
        end, following = (len(text), len(text)) if found is None else found.span()
        while position < end:
            stop = end if end - position <= _MOST_TEXT_BYTES else _end_of_text(text, position)
            if text[position:stop].strip():
                number += 1
                yield position, stop, number
            position = stop
        position = following


def _end_of_text(text: Text, position: int) -> int:
    """Of too long a document: the last end of a line, else the last place between characters, that is near enough."""
    most = position + _MOST_TEXT_BYTES
    line = text.rfind(b"\n", position, most)
    return line + 1 if line >= 0 else next(n for n in range(most, position, -1) if text[n] & 0xC0 != 0x80)


def find_rows(text: Text, delimiter: str) -> Iterator[Span]:
    """The rows of CSV or TSV, header included, that are not blank. A quoted field may span lines, as for `csv`.

    A quote that nothing closes costs its line only. In a TSV file, which has no quoting, a field counts as quoted only
    if it closes before the next tab, and never in a file of one column.
    """
    mark = re.escape(delimiter.encode())
    field = rb'(?:"(?:[^"]++|"")*+"[^%b\r\n]*+|[^%b\r\n]*+)' % (mark, mark)
    if delimiter == "\t":
        quoted = rb'"(?:[^"\t]++|"")*+"(?=[\t\r\n]|\Z)|' if b"\t" in text[: text.find(b"\n") + 1 or len(text)] else b""
        field = rb"(?:%b[^\t\r\n]*+)" % quoted
    row = re.compile(rb"%b(?:%b%b)*+(?:\r\n?|\n|\Z)" % (field, mark, field))
    line_end = re.compile(rb"\r\n?|\n")
    position, number = _after_bom(text), 1
    while position < len(text):
        end = _end(row, text, position)
        if text[position : min(end, position + 4096)].strip(b" \r\n"):
            yield position, end, number
        number += sum(1 for _ in line_end.finditer(text, position, end))
        position = end


def find_json_array(text: Text, name: str) -> Iterator[Span]:
    """The elements of the array that is the whole of `text`, by matching brackets outside strings.

    A broken element costs itself: if its brackets do not match, the next record is taken to begin where the same
    key opens an object as in the record before. Whatever stands between elements and is no comma (a number, a loose
    word), and text behind the array, becomes an element too, so that it is reported as a bad record and not lost. So
    does the missing end of a file that was cut off, as an empty one.

    Raises:
        DataError: the text is not an array.
    """
    opening = re.compile(rb"\s*+\[").match(text, _after_bom(text))
    if opening is None:
        raise DataError(_not_an_array(text, name))
    position, number, signature, complete = opening.end(), 0, b"", True
    patience = 8 * len(text) + (8 << 20)  # bytes looked at again, over all broken elements
    while (begin := _SOMETHING.search(text, position)) is not None:
        start, number = begin.start(), number + 1
        if text[start] == ord("]"):
            if _SOMETHING.search(text, start + 1) is not None:
                yield start, len(text), number
            return
        if text[start] not in b"{[":
            position, complete = _end(_LOOSE, text, start), False
            yield start, position, number
            continue
        complete, position = _match_brackets(text, start)
        if complete:
            signature = _signature(text, start) or signature
        else:
            patience -= position - start
            again = signature or _signature(text, start)
            following = text.find(again, start + 1) if again and patience > 0 else -1
            position = len(text) if following < 0 else following
        yield start, position, number
    if complete:
        yield len(text), len(text), number + 1


def _match_brackets(text: Text, start: int) -> tuple[bool, int]:
    """Whether the value that begins at `start` is closed, and one past its end, or where that showed it is not."""
    open_brackets = bytearray()
    position, end = start, min(len(text), start + MAX_RECORD_BYTES)
    while (found := _NEXT_BRACKET.match(text, position, end)) is not None:
        position = found.end()
        bracket = text[position - 1]
        if bracket in b"{[":
            open_brackets.append(bracket)
        elif open_brackets.pop() != _OPENING[bracket]:
            return False, position
        elif not open_brackets:
            return True, position
    return False, end


def _signature(text: Text, start: int) -> bytes:
    """How an object begins, up to its first key's colon: records of one file mostly begin alike. Empty if it is none.

    >>> _signature(b'[{"id": 1}]', 1)
    b'{"id":'
    """
    found = _FIRST_KEY.match(text, start)
    return found[0] if found else b""


def _end(pattern: re.Pattern[bytes], text: Text, position: int) -> int:
    found = pattern.match(text, position)
    assert found is not None, (pattern, position)
    return found.end()


def _after_bom(text: Text) -> int:
    return len(_BOM) if text[: len(_BOM)] == _BOM else 0


def _not_an_array(text: Text, name: str) -> str:
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"data file {name} is UTF-16; expected UTF-8"
    first = _SOMETHING.search(text, _after_bom(text))
    if first is None:
        return f"data file {name} is empty"
    begin = bytes(text[first.start() : first.start() + 1])
    return f"data file {name} is not a JSON list: it begins with {begin!r}, expected ["
