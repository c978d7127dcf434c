import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level_bpe, sentencepiece_like

from vlm.batch import IGNORE_INDEX
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import ConfigError, RecordError

BPE = byte_level_bpe()
IMAGE_ID = BPE.convert_tokens_to_ids("<image>")
START, END = BPE.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def tokenizer(name="chatml", backend=BPE, tokens_per_image=3):
    image_id = backend.convert_tokens_to_ids("<image>")
    return ConversationTokenizer(backend, TEMPLATES[name], image_token_id=image_id, tokens_per_image=tokens_per_image)


def talk(*turns, images=(), where="a.json: record 1"):
    roles = ("user", "assistant") * len(turns)
    parts = [turn if isinstance(turn, tuple) else (turn,) for turn in turns]
    return Conversation(tuple(Turn(role, part) for role, part in zip(roles, parts, strict=False)), images, where)


def supervised(example):
    return [label for label in example.labels if label != IGNORE_INDEX]


def test_ids_and_labels_are_made_in_one_pass():
    example = tokenizer()(talk((IMAGE, "\nWhat?"), "A dog.", images=("dog.png",)))
    bare = BPE("A dog.", add_special_tokens=False).input_ids
    assert example.input_ids.count(IMAGE_ID) == 3
    assert supervised(example) == [*bare, END]
    assert len(example.labels) == len(example.input_ids)
    assert example.images == ("dog.png",)
    assert BPE.decode(example.input_ids).startswith("<|im_start|>user\n<image><image><image>\nWhat?<|im_end|>")


def test_every_reply_of_several_turns_is_learned():
    example = tokenizer()(talk("Hi", "One.", "And?", "Two."))
    assert BPE.decode(supervised(example)) == "One.<|im_end|>Two.<|im_end|>"


@pytest.mark.parametrize("text", ["<|im_start|>", "<|im_end|>", "<image>", "<added>", "<|endoftext|>", "a<image>b"])
@pytest.mark.parametrize("role", [0, 1])
def test_control_words_that_somebody_typed_stay_text(text, role):
    turns = ["Hi", "Yes."]
    turns[role] = text
    example = tokenizer()(talk(*turns))
    assert example.input_ids.count(START) == 2
    assert example.input_ids.count(END) == 2
    assert IMAGE_ID not in example.input_ids
    assert text in BPE.decode(example.input_ids)


def test_a_typed_control_word_has_the_ids_of_the_bare_vocabulary():
    ids = tokenizer("plain")(talk("", "<|im_end|>")).input_ids
    assert len(ids) > 2  # several pieces of text, and the real end
    assert ids[-1] == END
    assert END not in ids[:-1]


@settings(deadline=None, max_examples=150)
@given(
    questions=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3),
    answer=st.text(min_size=1, max_size=20).filter(lambda text: text.strip()),
    vocab_size=st.sampled_from([300, 340, 400]),
)
def test_supervised_ids_decode_to_exactly_the_answers_and_their_end(questions, answer, vocab_size):
    try:
        answer.encode(), [question.encode() for question in questions]
    except UnicodeEncodeError:
        return
    backend = _backends[vocab_size]
    turns = [turn for question in questions for turn in (question, answer)]
    example = tokenizer(backend=backend)(talk(*turns))
    assert backend.decode(supervised(example)) == f"{answer}<|im_end|>" * len(questions)


_backends = {size: byte_level_bpe(vocab_size=size) for size in (300, 340, 400)}


def test_a_conversation_without_a_reply_is_skipped_by_rule():
    for conversation in (talk("Hi"), talk("Hi", ""), talk("Hi", "  ")):
        with pytest.raises(RecordError) as caught:
            tokenizer()(conversation)
        assert caught.value.rule == "no_supervised_tokens"


def test_a_picture_without_an_encoder_is_skipped_by_rule():
    text_only = ConversationTokenizer(BPE, TEMPLATES["chatml"])
    with pytest.raises(RecordError) as caught:
        text_only(talk((IMAGE, "Hi"), "Yes.", images=("a.png",)))
    assert caught.value.rule == "image_without_encoder"


LONG = talk((IMAGE, "What?"), "A dog.", (IMAGE, "And this?"), "A cat.", "Sure?", "Yes.", images=("a.png", "b.png"))


def test_an_over_long_record_is_dropped_or_cut_at_a_turn_as_the_config_says():
    whole = tokenizer()(LONG)
    length = len(whole.input_ids)
    with pytest.raises(RecordError) as caught:
        tokenizer().fit(LONG, length - 1, 9, "drop")
    assert caught.value.rule == "over_long"
    shorter = tokenizer().fit(LONG, length - 1, 9, "cut")
    assert BPE.decode(supervised(shorter)) == "A dog.<|im_end|>A cat.<|im_end|>"
    assert shorter.images == ("a.png", "b.png")


@pytest.mark.parametrize("max_length", range(20, 90, 3))
def test_a_cut_never_splits_a_picture(max_length):
    try:
        example = tokenizer().fit(LONG, max_length, 9, "cut")
    except RecordError as error:
        assert error.rule == "over_long"  # noqa: PT017
        return
    assert len(example.input_ids) <= max_length
    assert example.input_ids.count(IMAGE_ID) == 3 * len(example.images)
    assert BPE.decode(supervised(example)).endswith("<|im_end|>")


def test_too_many_pictures_is_a_rule_of_its_own():
    with pytest.raises(RecordError) as caught:
        tokenizer().fit(LONG, 1000, 1, "drop")
    assert caught.value.rule == "too_many_images"
    assert tokenizer().fit(LONG, 1000, 1, "cut").images == ("a.png",)


def test_a_sentencepiece_tokenizer_gets_its_blank_only_at_the_start_of_the_text():
    backend = sentencepiece_like()
    chat = tokenizer("vicuna", backend)
    example = chat(talk("Hello", "Hi there"))
    text = chat.template.default_system + " USER: Hello ASSISTANT: Hi there</s>"
    assert backend.decode(example.input_ids).replace("<s> ", "<s>").replace("<s>", "") == text
    assert example.input_ids[0] == backend.bos_token_id
    assert backend.decode(supervised(example)) == "Hi there</s>"


def test_a_prompt_ends_where_the_reply_begins():
    asked = talk("Hi")
    answered = talk("Hi", "Yes.")
    prompt = tokenizer().prompt(asked)
    assert tokenizer()(answered).input_ids[: len(prompt)] == prompt


def test_a_template_whose_end_is_no_token_is_refused():
    with pytest.raises(ConfigError, match="is no token of this tokenizer"):
        tokenizer("llama3")


def test_it_can_be_sent_to_a_worker_process():
    chat = pickle.loads(pickle.dumps(tokenizer()))
    assert chat(talk("Hi", "Yes.")).input_ids == tokenizer()(talk("Hi", "Yes.")).input_ids
