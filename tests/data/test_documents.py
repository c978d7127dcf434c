import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from vlm.data.build import build_conversation_tokenizer, build_data, build_reader
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.documents import Pieces
from vlm.data.report import check_records, print_stats
from vlm.data.scan import measure, scan_records
from vlm.data.tokenize import ConversationTokenizer

SENTENCES = "".join(f"Sentence {number} of a long text.\n" for number in range(40))


def config_of(path, **settings):
    values = {"template": "plain", "max_length": 64, "cache": str(path.parent / "cache"), **settings}
    return DataConfig(sources=[SourceConfig(path=str(path))], **values)


def scan_of(path, tokenizer, *, cache="cache", **settings):
    config = config_of(path, **settings)
    chat = build_conversation_tokenizer(config, tokenizer, None, None)
    return scan_records(build_reader(config, config.sources, chat), path.parent / cache)


def read_all(scan):
    return [scan.reader.read(number) for number in range(len(scan.lengths))]


@pytest.fixture
def texts(tmp_path):
    """A short text, a long one, and a short one."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Short.", SENTENCES, "End.")))
    return path


def test_a_text_over_max_length_becomes_pieces_that_are_its_words_again(texts, bpe):
    scan = scan_of(texts, bpe)
    reader = scan.reader
    assert scan.skips == []
    assert scan.lengths.max() <= 64
    numbers = scan.with_pieces(np.array([1]))
    pieces = [reader.conversation(int(number)).turns[-1].text for number in numbers]
    assert "".join(pieces) == SENTENCES.rstrip()
    cuts = list(pairwise(pieces))
    assert len(cuts) > 5
    assert all(piece.endswith("\n") or after.startswith(" ") for piece, after in cuts)  # no word is cut
    assert [reader.locate(int(number))[1] for number in numbers] == [1] * len(pieces)
    assert scan.describe_cut() == f"1 texts of more than 64 tokens are cut into {len(pieces)} pieces"


def test_only_the_last_piece_ends_as_a_text_does(texts, bpe):
    scan = scan_of(texts, bpe)
    numbers = scan.with_pieces(np.array([1])).tolist()
    ends = [scan.reader.read(number).labels[-1] == bpe.eos_token_id for number in numbers]
    assert ends == [False] * (len(numbers) - 1) + [True]
    assert [scan.lengths[number] for number in numbers] == [len(scan.reader.read(n).input_ids) for n in numbers]


def test_each_piece_is_encoded_once_and_once_more_where_its_end_is_looked_for(texts, bpe, monkeypatch):
    encoded, looked_at = [], []
    encode, ends_of_tokens = ConversationTokenizer.encode, ConversationTokenizer.ends_of_tokens
    monkeypatch.setattr(ConversationTokenizer, "encode", lambda *a: encoded.append(a[1]) or encode(*a))
    monkeypatch.setattr(
        ConversationTokenizer, "ends_of_tokens", lambda *a: looked_at.append(len(a[1])) or ends_of_tokens(*a)
    )
    scan = scan_of(texts, bpe)
    num_pieces = len(scan.lengths)
    assert num_pieces <= len(encoded) <= num_pieces + 2  # the ends of "Short." and "End." are not looked for
    assert sum(looked_at) < 2 * len(SENTENCES)


def test_large_documents_are_shared_out_a_few_at_a_time(tmp_path, bpe, monkeypatch):
    def work_of(reader, numbers, work, workers, what, chunk, many):
        sizes.append((chunk, many))
        yield 0, measure(reader, numbers)

    sizes = []
    monkeypatch.setattr("vlm.data.scan.in_chunks", work_of)
    monkeypatch.setattr("vlm.data.scan.CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr("vlm.data.scan.MANY_BYTES", 6 << 10)
    for name, text in (("small.txt", "One.\n<|endoftext|>\n" * 8), ("large.txt", "One.\n<|endoftext|>\n" + SENTENCES)):
        (tmp_path / name).write_text(text)
        scan_of(tmp_path / name, bpe)
    (tmp_path / "large.jsonl").write_text(json.dumps({"text": SENTENCES}))
    scan_of(tmp_path / "large.jsonl", bpe)
    assert sizes == [(53, 323), (1, 10), (2000, 50_000)]  # of 19 and some 600 bytes a document, and of records


def test_pieces_come_from_the_cache_too_and_belong_to_their_record(texts, bpe):
    first, second = scan_of(texts, bpe), scan_of(texts, bpe)
    assert second.reader.pieces.table.tolist() == first.reader.pieces.table.tolist()
    assert second.digest() == first.digest()
    data = build_data(
        config_of(texts, held_out=0.5), bpe, None, None, seed=3, global_batch_size=2, micro_batch_size=2
    )  # fmt: skip
    held_out = {int(n) for row in data.held_out.rows for n in row}
    trained = {int(n) for row in data.train.order.rows(0) for n in row}
    of_record = {1, *range(3, 3 + len(first.reader.pieces))}
    assert held_out | trained == {0, 2} | of_record
    assert of_record <= held_out or of_record <= trained


def test_pieces_are_read_from_the_cache_on_a_second_start_and_from_their_text_if_it_is_gone(texts, bpe, monkeypatch):
    first = scan_of(texts, bpe)
    fresh = scan_records(replace(first.reader, store=None, places=None, pieces=Pieces()), None)
    from_text = read_all(fresh)
    assert len(from_text) > 5
    with monkeypatch.context() as patched:
        patched.setattr(ConversationTokenizer, "encode", lambda *_: pytest.fail("tokenized again"))
        second = scan_of(texts, bpe)
        assert read_all(second) == read_all(first) == from_text
    assert (second.reader.places > 0).all()
    for shard in texts.parent.glob("cache/lengths/*/*.tokens"):
        shard.write_bytes(b"")
    assert read_all(first) == from_text


def test_a_scan_that_was_stopped_goes_on_with_the_pieces_it_has(texts, bpe, monkeypatch):
    whole = scan_of(texts, bpe, cache="elsewhere")
    done = []

    def stop_at_the_third(reader, numbers):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(numbers.tolist())
        return measure(reader, numbers)

    for name, value in (("CHUNK", 1), ("STORE_SECONDS", 0.0)):
        monkeypatch.setattr(f"vlm.data.scan.{name}", value)
    monkeypatch.setattr("vlm.data.scan.measure", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        scan_of(texts, bpe)
    monkeypatch.setattr("vlm.data.scan.measure", lambda *a: done.append(a[1].tolist()) or measure(*a))
    scan = scan_of(texts, bpe)
    assert done == [[0], [1], [2]]
    assert (scan.digest(), read_all(scan)) == (whole.digest(), read_all(whole))


def test_a_chat_template_cuts_nothing_and_says_what_would(texts, bpe):
    (skip,) = scan_of(texts, bpe, template="chatml").skips
    assert skip.rule == "over_long"
    assert "template plain cuts plain text into rows" in skip.message


def test_a_text_file_is_one_document_or_several_between_marks(tmp_path, bpe):
    whole, marked = tmp_path / "book.txt", tmp_path / "stories.txt"
    whole.write_text("\ufeffA line.\n\nAnother paragraph.\n", encoding="utf-8")
    marked.write_text("One.\nStill one.\n<|endoftext|>\n\n<|endoftext|>\nTwo.\n")
    shown = [scan_of(path, bpe).reader for path in (whole, marked)]
    assert [[r.conversation(n).turns[-1].text for n in range(len(r))] for r in shown] == [
        ["A line.\n\nAnother paragraph."],
        ["One.\nStill one.", "Two."],
    ]
    assert shown[1].sources[0].where(1) == "stories.txt: document 2"


def test_check_and_stats_count_what_is_cut(texts, bpe, capsys):
    config = config_of(texts)
    chat = build_conversation_tokenizer(config, bpe, None, None)
    check_records(config, chat, None)
    print_stats(config, chat)
    shown = capsys.readouterr().out
    assert shown.count("1 texts of more than 64 tokens are cut into") == 2
    assert "3 records, 3 usable" in shown
    assert "tokens per piece" in shown


def test_a_span_of_a_record_and_of_its_pieces():
    """Records 0 to 4; 1 has three pieces, 3 has two."""
    pieces = Pieces(np.array([[1, 10, 5, 5, 0], [1, 20, 5, 5, 0], [3, 7, 5, 5, 0]]))
    assert [pieces.span(number, 5) for number in (0, 1, 3, 5, 6, 7)] == [
        None, (1, 0, 10), (3, 0, 7), (1, 10, 20), (1, 20, None), (3, 7, None),
    ]  # fmt: skip
    assert pieces.of(np.array([0, 3]), 5).tolist() == [0, 3, 7]
