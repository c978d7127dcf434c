from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlm.generation.streaming import TextStream


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer of one token per byte."""
    return bytes(ids).decode("utf-8", errors="replace")


MARK = 256  # a token without text, as <image> is


class Counting:
    """A tokenizer of one token per byte that counts what it decodes."""

    def __init__(self) -> None:
        self.num_decoded = 0

    def __call__(self, ids: list[int]) -> str:
        self.num_decoded += len(ids)
        return decode_bytes([i for i in ids if i != MARK])


def pieces(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(decode_bytes, stop)
    return [stream.push(byte) for byte in text.encode()] + [stream.finish()]


def test_a_chinese_character_comes_out_whole_and_with_its_last_byte():
    assert pieces("猫a") == ["", "", "猫", "a", ""]


@given(st.text(max_size=12))
def test_the_pieces_together_are_the_text(text: str):
    assert "".join(pieces(text)).rstrip("\ufffd") == text.rstrip("\ufffd")


def test_the_bytes_of_a_character_that_was_cut_off_are_left_out():
    stream = TextStream(decode_bytes)
    assert [stream.push(byte) for byte in "好猫".encode()[:5]] == ["", "", "好", "", ""]
    assert stream.finish() == ""


def test_a_stop_string_and_all_after_it_is_never_given_out():
    assert "".join(pieces("one\nUSER: two", ("\nUSER:",))) == "one"


def test_what_only_looks_like_a_stop_string_comes_later_but_comes():
    assert pieces("a\nUb", ("\nUSER:",)) == ["a", "", "", "\nUb", ""]
    assert pieces("a\nU", ("\nUSER:",)) == ["a", "", "", "\nU"]


def test_the_first_of_several_stop_strings_wins():
    assert "".join(pieces("a##b--c", ("--", "##"))) == "a"


def test_tokens_without_text_cost_no_more_the_more_there_are():
    decode = Counting()
    stream = TextStream(decode)
    ids = [*b"one", *[MARK] * 2000, *" 猫".encode(), *[MARK] * 2000, *"🐈!".encode()]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == "one 猫🐈!"
    assert decode.num_decoded < 40 * len(ids)  # two short pieces for each token; all tokens each time would be 4,000


def test_bytes_that_never_become_a_character_are_not_held_for_ever():
    decode = Counting()
    stream = TextStream(decode)
    bad = [0xFF] * 2000
    given = "".join(stream.push(byte) for byte in bad)
    assert 2000 - 16 <= len(given) < 2000
    assert decode.num_decoded < 60 * len(bad)
    assert given + "".join(stream.push(byte) for byte in "猫a".encode()) == "\ufffd" * 2000 + "猫a"
