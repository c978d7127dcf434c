"""Which orders of turns can be trained on, and which are mended (row 34 of the faults)."""

from __future__ import annotations

import pickle

import pytest

from vlm.data.conversation import IMAGE, Conversation, Turn, check_conversation, normalise_turns
from vlm.errors import RecordError

SYSTEM, USER, REPLY = Turn("system", ("Be brief.",)), Turn("user", ("Hi",)), Turn("assistant", ("Yes?",))


@pytest.mark.parametrize(
    "turns",
    [
        (USER, REPLY),
        (SYSTEM, USER, REPLY),
        (USER, REPLY, USER, REPLY),
        (USER, REPLY, USER),  # the last question is read, not learned
    ],
)
def test_these_orders_are_accepted_unchanged(turns):
    conversation = Conversation(turns)
    assert check_conversation(conversation) is conversation


@pytest.mark.parametrize(
    ("turns", "rule", "said"),
    [
        ((), "empty_conversation", "no user or assistant turn"),
        ((SYSTEM,), "empty_conversation", "no user or assistant turn"),
        ((REPLY, USER), "assistant_first", "turn 1 is assistant, expected user"),
        ((SYSTEM, REPLY), "assistant_first", "turn 2 is assistant, expected user"),
        ((USER, USER, REPLY), "role_repeated", "turn 2 is user, expected assistant"),
        ((SYSTEM, USER, REPLY, REPLY), "role_repeated", "turn 4 is assistant, expected user"),
        ((USER, SYSTEM, REPLY), "system_not_first", "turn 2 is a system turn"),
        ((SYSTEM, SYSTEM, USER), "system_not_first", "turn 2 is a system turn"),
        ((Turn("tool", ("4",)),), "unknown_role", "turn 1: role 'tool'"),
    ],
)
def test_other_orders_are_refused_by_a_named_rule(turns, rule, said):
    with pytest.raises(RecordError) as caught:
        check_conversation(Conversation(turns, where="a.json: record 3"))
    assert caught.value.rule == rule
    assert str(caught.value).startswith(f"a.json: record 3: {said}")


def test_every_image_needs_one_slot():
    look = Turn("user", (IMAGE, "\nWhat?"))
    assert check_conversation(Conversation((look, REPLY), ("a.png",))).num_slots == 1
    for images in ((), ("a.png", "b.png")):
        with pytest.raises(RecordError, match=f"1 <image> marks, {len(images)} images") as caught:
            check_conversation(Conversation((look, REPLY), images))
        assert caught.value.rule == "image_count"


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_show_images(role):
    turns = {"system": (Turn("system", (IMAGE,)), USER), "assistant": (USER, Turn("assistant", (IMAGE,)))}[role]
    with pytest.raises(RecordError) as caught:
        check_conversation(Conversation(turns, ("a.png",)))
    assert caught.value.rule == "image_in_answer"


def test_users_in_a_row_are_joined_with_their_images_in_order():
    turns = (Turn("user", ("Look: ", IMAGE)), Turn("user", ("Now: ", IMAGE, " ok?")), REPLY)
    assert normalise_turns(turns) == (Turn("user", ("Look: ", IMAGE, "\n", "Now: ", IMAGE, " ok?")), REPLY)


def test_an_empty_system_turn_is_left_out_and_a_full_one_stays():
    assert normalise_turns((Turn("system", (" \n",)), USER, REPLY)) == (USER, REPLY)
    assert normalise_turns((SYSTEM, USER, REPLY)) == (SYSTEM, USER, REPLY)


def test_two_replies_in_a_row_are_not_joined():
    assert normalise_turns((USER, REPLY, REPLY)) == (USER, REPLY, REPLY)


def test_the_first_turns_keep_only_their_images():
    turns = (Turn("user", (IMAGE, "1")), REPLY, Turn("user", ("2", IMAGE, IMAGE)), REPLY)
    conversation = Conversation(turns, ("a", "b", "c"), "x")
    assert conversation.first_turns(2) == Conversation(turns[:2], ("a",), "x")
    assert conversation.first_turns(4) == conversation


def test_a_slot_is_still_a_slot_after_the_way_to_a_worker():
    assert pickle.loads(pickle.dumps(Turn("user", (IMAGE, "?")))) == Turn("user", (IMAGE, "?"))
