import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers_for_tests import CONTROL, TEXTS, byte_level_bpe, sentencepiece_like
from transformers import PreTrainedTokenizerFast

from vlm.batch import IGNORE_INDEX
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import ConfigError, RecordError

BPE = byte_level_bpe()
IMAGE_ID = BPE.convert_tokens_to_ids("<image>")
END = BPE.convert_tokens_to_ids("<|im_end|>")


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


def whole_words(tokenizer):
    """The same, but text is looked up whole before it is taken apart, as Llama 3's does."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["ignore_merges"] = True
    backend["pre_tokenizer"]["use_regex"] = False
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>")


def unigram():
    """Like T5's: its control words are entries of the vocabulary, likelier than any text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *CONTROL, "<image>", "<added>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([*TEXTS, "<|im_start|> </s> <image> <added> <s> <|endoftext|>"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TYPED = ["<|im_start|>", "<|im_end|>", "<image>", "<added>", "<|endoftext|>", "a<image>b", "<image><image>"]


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("backend", [BPE, whole_words(BPE), unigram()], ids=["bpe", "whole words", "unigram"])
def test_control_words_that_somebody_typed_stay_text(text, role, backend):
    said = {"system": "Be brief.", "user": "Hi", "assistant": "Yes."}
    honest, typed = (
        tokenizer(backend=backend)(Conversation(tuple(Turn(name, (words[name],)) for name in said)))
        for words in (said, said | {role: text})
    )
    for word in (*CONTROL, "<image>", "<added>"):
        control = backend.convert_tokens_to_ids(word)
        assert typed.input_ids.count(control) == honest.input_ids.count(control), word
    assert text in backend.decode(typed.input_ids)


@given(text=st.lists(st.sampled_from(["a", " ", *CONTROL, "<image>", "<added>", "<", "|"]), min_size=1).map("".join))
@settings(deadline=None, max_examples=60)
def test_content_has_the_ids_of_a_vocabulary_without_control_words(text):
    backend = json.loads(BPE.backend_tokenizer.to_str())
    bare = Tokenizer.from_str(json.dumps({**backend, "added_tokens": []}))
    assert (
        tokenizer().prompt(talk(text))[3:-5] == bare.encode(text).ids
    )  # within <|im_start|>user\n ... <|im_end|>\n ...


def test_ten_thousand_typed_control_words_are_text_too():
    example = tokenizer("plain", unigram())(talk("", "</s>" * 10_000))
    assert example.input_ids.count(unigram().eos_token_id) == 1


def test_characters_that_a_vocabulary_lacks_are_unknown_as_the_tokenizer_itself_has_it():
    backend = unigram()
    example = tokenizer("plain", backend)(talk("", "語" * 5000 + " a"))
    assert example.input_ids[:-1] == backend("語" * 5000 + " a", add_special_tokens=False).input_ids


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)  # no lone surrogates: see records.py


@settings(deadline=None, max_examples=100)
@given(
    corpus=st.lists(TEXT, min_size=1, max_size=4),
    questions=st.lists(TEXT, min_size=1, max_size=3),
    answer=TEXT.filter(str.strip),
)
def test_supervised_ids_decode_to_exactly_the_answers_and_their_end(corpus, questions, answer):
    words = [*corpus, f"assistant\n{answer}", f"{answer}<|im_end|>\n", f"\n{answer}"]  # merges across role borders
    backend = byte_level_bpe(words * 3, vocab_size=320)
    turns = [turn for question in questions for turn in (question, answer)]
    example = tokenizer(backend=backend)(talk(*turns))
    assert backend.decode(supervised(example)) == f"{answer}<|im_end|>" * len(questions)


def test_a_token_that_would_reach_over_the_border_of_a_role_is_not_used():
    backend = byte_level_bpe(["\n\n\n\n"] * 50, vocab_size=300)  # learns that two line ends are one token
    assert len(backend("\n\n", add_special_tokens=False).input_ids) == 1
    ids = tokenizer(backend=backend)(talk("Hi", "\nYes.")).input_ids
    line_end = backend.convert_tokens_to_ids("\u010a")
    reply = backend("\nYes.", add_special_tokens=False).input_ids
    assert ids[-2 - len(reply) : -2] == reply
    assert ids[-3 - len(reply)] == line_end  # of "<|im_start|>assistant\n", by itself
    assert ids[-1] == line_end  # after <|im_end|>


def test_a_conversation_without_a_reply_is_skipped_by_rule():
    for conversation in (talk("Hi"), talk("Hi", ""), talk("Hi", "  ")):
        with pytest.raises(RecordError) as caught:
            tokenizer()(conversation)
        assert caught.value.rule == "no_supervised_tokens"


def test_an_image_without_an_encoder_is_skipped_by_rule():
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
def test_a_cut_never_splits_an_image(max_length):
    try:
        example = tokenizer().fit(LONG, max_length, 9, "cut")
    except RecordError as error:
        assert error.rule == "over_long"  # noqa: PT017
        return
    assert len(example.input_ids) <= max_length
    assert example.input_ids.count(IMAGE_ID) == 3 * len(example.images)
    assert BPE.decode(supervised(example)).endswith("<|im_end|>")


@settings(deadline=None, max_examples=60)
@given(
    turns=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 15)), min_size=1, max_size=6),
    max_length=st.integers(20, 200),
    max_images=st.integers(0, 4),
)
def test_a_cut_keeps_as_many_whole_turns_as_any_cut_could(turns, max_length, max_images):
    said = [part for images, words in turns for part in (((IMAGE,) * images + ("Hm?",)), "Yes. " * words)]
    count = sum(images for images, _ in turns)
    whole = talk(*said, images=tuple(f"{n}.png" for n in range(count)))
    chat = tokenizer()
    cuts = [chat(whole.first_turns(2 * kept)) for kept in range(1, len(turns) + 1)]
    best = [cut for cut in cuts if len(cut.input_ids) <= max_length and len(cut.images) <= max_images]
    try:
        found = chat.fit(whole, max_length, max_images, "cut")
    except RecordError as error:
        assert error.rule in ("over_long", "too_many_images")  # noqa: PT017
        assert best == []
        return
    assert found == best[-1]
    assert found.input_ids.count(IMAGE_ID) == 3 * len(found.images)


def test_too_many_images_is_a_rule_of_its_own():
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


def test_the_first_token_is_never_learned_since_nothing_stands_before_it():
    example = tokenizer("plain")(talk("", "A dog."))  # no begin token: the reply comes first
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


@pytest.mark.parametrize("name", ["vicuna", "llama2", "alpaca"])
def test_a_control_word_that_begins_the_text_begins_it_as_the_tokenizer_would(name):
    backend = sentencepiece_like()
    bare = ConversationTokenizer(backend, replace(TEMPLATES[name], default_system=None))
    ids = bare(talk("Hello", "Hi")).input_ids
    own = backend(backend.decode(ids[1:])).input_ids
    assert backend.convert_ids_to_tokens(ids)[:2] == [
        "<s>",
        "▁" if name == "llama2" else "▁USER" if name == "vicuna" else "▁###▁",
    ]
    assert backend.convert_ids_to_tokens(ids[1:2])[0][0] == backend.convert_ids_to_tokens(own[1:2])[0][0] == "▁"


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
