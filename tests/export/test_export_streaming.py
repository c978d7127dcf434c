from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlm.export.streaming import TextStream


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer of one token per byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(decode_bytes, stop)
    return [stream.push(byte) for byte in text.encode()] + [stream.finish()]


def test_a_chinese_character_comes_out_whole_and_with_its_last_byte():
    assert pieces("猫a") == ["", "", "猫", "a", ""]


@given(st.text(max_size=12))
def test_the_pieces_together_are_the_text(text: str):
    assert "".join(pieces(text)) == text.rstrip("\ufffd")


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
