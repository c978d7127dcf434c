"""Where each record of a data file begins and ends, so that any one can be read without the others.

JSON arrays, JSONL and tables of any size are scanned once through a memory map (`vlm.data.spans`); the places are kept
in the cache folder and memory-mapped, so memory does not grow with the number of records.
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm.data.sniff import HEAD, describe, describe_json
from vlm.data.spans import MAX_RECORD_BYTES, Span, find_documents, find_json_array, find_lines, find_rows
from vlm.data.tables import has_quoted_header, parse_row, refuse_joined_rows
from vlm.errors import DataError, RecordError
from vlm.files import replacing, sha256
from vlm.logs import Progress, warn

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TOLD_EVERY = 10_000  # records between looks at the clock
_VERSION = 3  # of the stored spans; a higher one makes older caches unread


class RecordIndex:
    """Random access to the records of one file. Cheap to send to worker processes: it opens its files again there.

    Args:
        path: the file that the spans point into.
        spans: int64 [n, 3]: first byte, one past the last, and the number to name in messages, of each record; of a
            table, the header first.
        unit: what that number counts, from 1: "line", "record", or "document" of plain text.
        name: of the file, for messages; another than `path.name` for an unpacked .gz.
        stored: the .npy file that `spans` is mapped from, if it is.
        columns: names of the columns of a CSV or TSV file; None for JSON.
        unquotes_all: of a TSV file, see `parse_row`.
    """

    def __init__(
        self,
        path: Path,
        spans: np.ndarray,
        unit: str,
        *,
        name: str | None = None,
        stored: Path | None = None,
        columns: tuple[str, ...] | None = None,
        delimiter: str = ",",
        unquotes_all: bool = False,
    ) -> None:
        self.path = path
        self.name = name or path.name
        self.columns = columns
        self.spans = self._without_header(spans)
        self.unit = unit
        self.stored = stored
        self.delimiter = delimiter
        self._unquotes_all = unquotes_all
        self._fingerprint = fingerprint(path)
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "spans": self.spans if self.stored is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.stored is not None:
            self.spans = self._without_header(np.load(self.stored, mmap_mode="r", allow_pickle=False))

    def where(self, index: int) -> str:
        return f"{self.name}: {self.unit} {self.spans[index, 2]}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def content_digest(self) -> str:
        """Remembered beside the spans, as long as the file is the same to the file system."""
        status = self.path.stat()
        identity = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        if self.stored is None:
            return sha256(self.path)
        kept = self.stored.with_suffix(".sha256.json")
        with suppress(OSError, ValueError, TypeError, KeyError):  # not there, or damaged
            remembered = json.loads(kept.read_bytes())
            if remembered["file"] == identity and len(remembered["sha256"]) == 64:
                return str(remembered["sha256"])
        digest = sha256(self.path)
        with suppress(OSError), replacing(kept) as temporary:  # it is read again next time
            temporary.write_text(json.dumps({"file": identity, "sha256": digest}))
        return digest

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The parsed record.

        Raises:
            RecordError: rules bad_json, duplicate_key, not_an_object, bad_csv, bad_columns, bad_text, record_too_large.
            DataError: the file was changed since it was indexed.
        """
        start, end, _ = self.spans[index].tolist()
        try:
            if end - start > MAX_RECORD_BYTES:
                raise RecordError(
                    "record_too_large",
                    f"{(end - start) >> 20} MiB long, at most {MAX_RECORD_BYTES >> 20}. Usually a bracket or a quote "
                    "is missing in it, and it takes along the records behind it",
                )
            if start == end:
                raise RecordError("bad_json", "the list is not closed: the file was cut off here")
            # pread leaves the file position alone, which forked workers would share
            raw = os.pread(self._open().fileno(), end - start, start)
            if self.unit == "document":
                return _parse_text(raw)
            return parse_json_record(raw) if self.columns is None else self._parse_row(raw)
        except RecordError as error:
            raise error.at(self.where(index)) from None

    def _without_header(self, spans: np.ndarray) -> np.ndarray:
        spans = np.asarray(spans)  # of a map too: it stays mapped, and is read from without Python between
        return spans if self.columns is None else spans[1:]

    def _open(self) -> BinaryIO:
        if self._file is None:
            if fingerprint(self.path) != self._fingerprint:
                raise DataError(f"data file {self.path} was changed since it was indexed: start the command again")
            self._file = self.path.open("rb", buffering=0)
        return self._file

    def _parse_row(self, raw: bytes) -> dict[str, Any]:
        assert self.columns is not None
        row = parse_row(raw, self.delimiter, self._unquotes_all)
        if len(row) != len(self.columns):
            num_lines = len(raw.strip(b"\r\n").splitlines())
            joined = f" (a quote joins {num_lines} lines to one row)" if num_lines > 1 else ""
            raise RecordError(
                "bad_columns", f"{len(row)} columns, expected {len(self.columns)}: {', '.join(self.columns)}{joined}"
            )
        if self.delimiter == ",":
            refuse_joined_rows(raw, self.delimiter, len(self.columns))
        return dict(zip(self.columns, row, strict=True))


def open_index(path: Path, cache: Path, name: str | None = None) -> RecordIndex:
    """Index a .json, .jsonl, .csv, .tsv or .txt file, each also with .gz.

    Args:
        path: the data file.
        name: of the file, for messages; None takes its own.
        cache: folder for spans (and for the unpacked text of a .gz file); a folder that cannot be written costs
            time, not the run.

    Raises:
        DataError: missing, unreadable, empty, or not a list of records.
    """
    if not path.is_file():
        raise DataError(f"data file {path} does not exist. Check data.sources; relative paths start where you run")
    name = name or path.name
    try:
        if path.suffix.lower() == ".gz":
            path = _unpacked(path, cache)
        return _open_plain(path, name, cache)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror or error})") from None


def fingerprint(path: Path) -> str:
    """Name, size and modification time of a file, hashed: changes when the file is edited or replaced."""
    status = path.stat()
    return hashlib.sha256(
        f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape")
    ).hexdigest()[:16]


def _parse_text(raw: bytes) -> dict[str, Any]:
    try:
        return {"text": raw.decode("utf-8").strip("\r\n")}
    except UnicodeDecodeError as error:
        raise RecordError("bad_text", f"not UTF-8 (byte {error.start} of the document)") from None


def parse_json_record(raw: bytes) -> dict[str, Any]:
    """One JSON object, strictly: no NaN, no repeated key, no nesting that would exhaust the stack.

    Raises:
        RecordError: rules bad_json, duplicate_key, not_an_object.
    """
    try:
        text = raw.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("a UTF-8 BOM stands before it")
        value = _STRICT.decode(text)
    except UnicodeDecodeError as error:
        raise RecordError("bad_json", f"not UTF-8 (byte {error.start} of the record)") from None
    except RecursionError:
        raise RecordError("bad_json", "nested too deeply") from None
    except ValueError as error:  # bad syntax, NaN, an integer of thousands of digits
        comma = " (a comma ends the line; JSON Lines has none)" if raw.rstrip().endswith((b"},", b"],")) else ""
        raise RecordError("bad_json", f"not JSON: {str(error)[:120]}{comma}") from None
    if not isinstance(value, dict):
        raise RecordError("not_an_object", f"a {type(value).__name__}, expected an object {{...}}")
    return value


def _no_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RecordError("duplicate_key", f"key {repeated[:40]!r} stands twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_no_repeated_key, parse_constant=_refuse_constant)


def _open_plain(path: Path, name: str, cache: Path) -> RecordIndex:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl", ".txt", *DELIMITERS):
        known = "known: .json .jsonl .csv .tsv .txt (each also .gz)"
        raise DataError(f"data file {path}: unknown ending {suffix!r}; {known}")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty")
    _refuse_other_kind(path, name, suffix)
    if suffix == ".jsonl":
        spans, stored = _spans(path, cache, find_lines)
        return RecordIndex(path, spans, "line", name=name, stored=stored)
    if suffix == ".txt":
        spans, stored = _spans(path, cache, find_documents)
        return RecordIndex(path, spans, "document", name=name, stored=stored)
    if suffix == ".json":
        spans, stored = _spans(path, cache, lambda text: find_json_array(text, name))
        return RecordIndex(path, spans, "record", name=name, stored=stored)
    delimiter = DELIMITERS[suffix]
    spans, stored = _spans(path, cache, lambda text: find_rows(text, delimiter))
    if len(spans) == 0:
        raise DataError(f"data file {path} is empty: expected a header line and rows")
    header = _first_bytes(path, int(spans[0][0]), int(spans[0][1]))
    is_quoted = delimiter == "\t" and has_quoted_header(header)
    columns = _header(path, header, delimiter, is_quoted)
    return RecordIndex(
        path, spans, "line", name=name, stored=stored, columns=columns, delimiter=delimiter, unquotes_all=is_quoted
    )


def _refuse_other_kind(path: Path, name: str, suffix: str) -> None:
    """Raise DataError for a file that is something else than its name says, and say what it is."""
    head = _first_bytes(path, 0, 1 << 20)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    what = describe(head[:HEAD], len(head))
    if what and not (suffix in DELIMITERS and what.startswith(("an MP3", "an icon"))):  # a table may begin so
        if what == "UTF-16 text":
            raise DataError(f"data file {path} is UTF-16; expected UTF-8")
        expected = f"not a JSON list: it begins with {start[:1]!r}" if suffix == ".json" else f"no {suffix} file"
        raise DataError(f"data file {path} is {expected}. It is {what}")
    if suffix == ".json" and start[:1] not in (b"[", b""):
        begins = f"is not a JSON list: it begins with {start[:1]!r}, expected ["
        raise DataError(f"data file {path} {begins}. {describe_json(path, name)}")
    if suffix == ".jsonl" and start[:1] == b"[" and _is_whole_list(start):
        raise DataError(f"data file {path} is one JSON list, not an object per line. Name it {path.stem}.json")
    if suffix == ".jsonl" and start.split(b"\n")[0].strip() == b"{":
        raise DataError(
            f"data file {path}: its objects are spread over several lines; .jsonl has one per line. "
            f"`jq -c . {path.name}` writes it so"
        )


def _is_whole_list(start: bytes) -> bool:
    """Whether a text that begins with [ is one list, and not lines that happen to be lists."""
    first, _, rest = start.partition(b"\n")
    try:
        json.loads(first)
    except ValueError:
        return True
    return not rest.strip()


def _first_bytes(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(min(end - start, 1 << 20))


def _header(path: Path, raw: bytes, delimiter: str, is_quoted: bool) -> tuple[str, ...]:
    try:
        columns = tuple(column.strip() for column in parse_row(raw, delimiter, is_quoted))
    except RecordError as error:
        raise DataError(f"data file {path}: the header line is {error.message}") from None
    if len(set(columns)) != len(columns):
        raise DataError(f"data file {path}: a column name stands twice in the header {columns}")
    return columns


def _spans(path: Path, cache: Path, scan: Callable[[mmap.mmap], Iterator[Span]]) -> tuple[np.ndarray, Path | None]:
    """The spans of a file, int64 [n, 3], and the cache file they are mapped from, or None if they lie in memory."""
    key = hashlib.sha256(f"{os.fspath(path.resolve())!r}\0{fingerprint(path)}\0{_VERSION}".encode()).hexdigest()[:24]
    stored = cache / "index" / f"{key}.npy"
    spans = _load_spans(stored, path.stat().st_size)
    if spans is not None:
        return spans, stored
    with path.open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped with its last reader
    with Progress(f"data: indexed {path.name}:", len(text), "bytes") as progress:
        spans = np.fromiter(_flat(scan(text), progress), dtype=np.int64).reshape(-1, 3)
    try:
        with replacing(stored) as temporary:
            np.save(temporary, spans)
    except OSError as error:
        warn(f"data.cache: cannot write to {stored.parent} ({error.strerror}); {path.name} is indexed in memory")
        return spans, None
    mapped = _load_spans(stored, path.stat().st_size)
    return (spans, None) if mapped is None else (mapped, stored)


def _flat(spans: Iterator[Span], progress: Progress) -> Iterator[int]:
    for number, span in enumerate(spans):
        if number % _TOLD_EVERY == 0:
            progress.show(span[1])
        yield from span


def _load_spans(stored: Path, file_size: int) -> np.ndarray | None:
    """Spans from the cache; None if they are not there, damaged, or point behind the end of the file."""
    try:
        spans = np.load(stored, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # ValueError: damaged, or of a file without records
        return None
    fits = spans.dtype == np.int64 and spans.ndim == 2 and spans.shape[1] == 3 and len(spans) > 0
    return spans if fits and spans[0, 0] >= 0 and spans[-1, 1] <= file_size else None


def _unpacked(path: Path, cache: Path) -> Path:
    """The text of a .gz file, unpacked once into the cache, or for this process alone if the cache is read-only."""
    name = f"{fingerprint(path)}-{path.with_suffix('').name}"
    target = cache / "unpacked" / name
    if target.exists():
        return target
    try:
        _unpack(path, target)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="vlm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        warn(f"data.cache: cannot write to {target.parent} ({error.strerror}); {path.name} is unpacked into {folder}")
        target = folder / name
        _unpack(path, target)
    return target


def _unpack(path: Path, target: Path) -> None:
    try:
        with replacing(target) as temporary, temporary.open("xb") as file, gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"data file {path} is not a whole gzip file ({error})") from None
