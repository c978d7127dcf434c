import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level_bpe, sentencepiece_like

from vlm.batch import IGNORE_INDEX
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.template import BOS, EOS, TEMPLATES, Piece, check_template, match_tokenizer_template, render_text
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import ConfigError

ASKED = Conversation(
    (
        Turn("user", (IMAGE, "\nWhat is this?")),
        Turn("assistant", ("A dog.",)),
        Turn("user", ("Sure?",)),
        Turn("assistant", ("Yes.",)),
    ),
    ("dog.png",),
)
WITH_SYSTEM = Conversation((Turn("system", ("Be brief.",)), *ASKED.turns), ("dog.png",))


def written(name, conversation=ASKED, **kwargs):
    pieces = TEMPLATES[name].render(conversation, **kwargs)
    text = "".join(piece.text if isinstance(piece, Piece) else "<image>" for piece in pieces)
    return text.replace(BOS, "<s>").replace(EOS, "</s>")


def learned(name):
    pieces = TEMPLATES[name].render(ASKED)
    return [piece.text.replace(EOS, "</s>") for piece in pieces if isinstance(piece, Piece) and piece.is_reply]


def test_each_family_writes_a_conversation_its_own_way():
    assert written("plain") == "<s><image>A dog.</s>Yes.</s>"
    assert written("chatml") == (
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert written("internlm2") == "<s>" + written("chatml")
    assert written("llama2", WITH_SYSTEM) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is this? [/INST] A dog. </s>"
        "<s>[INST] Sure? [/INST] Yes. </s><s>"
    )
    assert written("llama3", WITH_SYSTEM).startswith(
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
    )
    assert written("vicuna", WITH_SYSTEM) == (
        "<s>Be brief. USER: <image>\nWhat is this? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT: Yes.</s>"
    )
    assert written("alpaca", WITH_SYSTEM).startswith(
        "<s>Be brief.\n\n### Instruction:\n<image>\nWhat is this?\n\n### R"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_reply_is_learned_with_the_token_that_ends_it_and_nothing_else(name):
    end = TEMPLATES[name].stop.replace(EOS, "</s>")
    prefix = TEMPLATES[name].assistant.prefix
    assert learned(name) == [f"{prefix}A dog.", end, f"{prefix}Yes.", end]


def test_a_system_turn_beats_the_configs_prompt_and_that_beats_the_templates_own():
    assert written("vicuna").startswith("<s>A chat between")
    assert written("vicuna", system="Short.").startswith("<s>Short. USER:")
    assert written("vicuna", WITH_SYSTEM, system="Short.").startswith("<s>Be brief. USER:")


def test_the_generation_prompt_is_what_stands_before_a_reply():
    question = Conversation((Turn("user", ("Hi",)),))
    assert written("chatml", question, add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert written("vicuna", question, system="S", add_generation_prompt=True) == "<s>S USER: Hi ASSISTANT:"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", [ASKED, WITH_SYSTEM], ids=["no system", "system"])
def test_the_jinja_form_writes_the_same_and_marks_the_same_replies(name, conversation):
    tokenizer = sentencepiece_like()
    template = TEMPLATES[name]
    tokenizer.chat_template = template.jinja("<s>", "</s>", tokenizer_adds_bos=True)
    messages = [
        {
            "role": turn.role,
            "content": [{"type": "image"} if p == IMAGE else {"type": "text", "text": p} for p in turn.parts],
        }
        for turn in conversation.turns
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == written(name, conversation)
    flat = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
    assert tokenizer.apply_chat_template(flat, tokenize=False) == written(name, conversation).replace("<image>", "")
    asked = messages[:-1]
    cut = Conversation(conversation.turns[:-1], conversation.images)
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert rendered == written(name, cut, add_generation_prompt=True)
    assert "{%- generation -%}" in tokenizer.chat_template


def test_a_tokenizers_own_template_is_recognised_with_its_default_system_prompt():
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nI am T.<|im_end|>\n"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    matched = match_tokenizer_template(tokenizer)
    assert (matched.name, matched.default_system) == ("chatml", "I am T.")


def test_a_template_that_none_of_ours_writes_is_refused_with_what_it_writes():
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{% for m in messages %}## {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="## user: Hi"):
        match_tokenizer_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        match_tokenizer_template(tokenizer)


SPACED = st.text(alphabet="ab \n\t<{%'\"\\", min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(TEMPLATES)), said=SPACED, answer=SPACED, system=st.none() | SPACED)
def test_the_jinja_form_keeps_every_blank_quote_and_brace_of_the_content(name, said, answer, system):
    turns = (Turn("user", (said,)), Turn("assistant", (answer,)))
    turns = turns if system is None else (Turn("system", (system,)), *turns)
    TOKENIZER.chat_template = TEMPLATES[name].jinja("<s>", "</s>", tokenizer_adds_bos=True)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == written(name, Conversation(turns))


TOKENIZER = sentencepiece_like()


def test_the_assistant_mask_of_transformers_covers_exactly_what_we_learn():
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = TEMPLATES["chatml"].jinja(None, "<|im_end|>", tokenizer_adds_bos=False)
    conversation = Conversation((Turn("user", ("Hi",)), Turn("assistant", ("A dog.",)), *ASKED.turns[2:]))
    theirs = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in conversation.turns],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = ConversationTokenizer(tokenizer, TEMPLATES["chatml"])(conversation)
    assert theirs["input_ids"] == ours.input_ids
    assert theirs["assistant_masks"] == [int(label != IGNORE_INDEX) for label in ours.labels]


QWEN2 = (  # each as the family's tokenizers bring it, shortened to what text conversations use
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INTERNLM2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("own", "name", "system"),
    [
        (QWEN2, "chatml", "You are a helpful assistant."),
        (INTERNLM2, "internlm2", None),
        (LLAMA2, "llama2", None),
        (LLAMA3, "llama3", None),
    ],
    ids=["qwen2", "internlm2", "llama2", "llama3"],
)
def test_the_families_own_templates_are_recognised(own, name, system):
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = own
    matched = match_tokenizer_template(tokenizer)
    assert (matched.name, matched.default_system) == (name, system)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_like])
def test_every_template_of_ours_is_recognised_in_its_jinja_form(name, make):
    if name == "plain":  # leaves out what the user says, so it is no chat template
        return
    tokenizer = make()
    bos, adds = tokenizer.bos_token, tokenizer.bos_token is not None
    tokenizer.chat_template = TEMPLATES[name].jinja(bos, tokenizer.eos_token, tokenizer_adds_bos=adds)
    matched = match_tokenizer_template(tokenizer)
    talk = (Turn("user", ("Hi",)), Turn("assistant", ("Yes?",)), Turn("user", ("Go",)))
    for system in (None, "Be brief."):  # several names have the same format, which is then the first's
        assert render_text(matched, tokenizer, talk, system) == render_text(TEMPLATES[name], tokenizer, talk, system)


def test_a_template_that_refuses_system_turns_is_an_error_with_its_own_words():
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"System role not supported.*Name one of: plain, chatml"):
        match_tokenizer_template(tokenizer)


def test_control_words_that_the_tokenizer_does_not_know_are_named():
    assert check_template(byte_level_bpe(), TEMPLATES["chatml"]) == ""
    assert check_template(sentencepiece_like(), TEMPLATES["llama2"]) == ""  # [INST] is plain text in Llama 2 as well
    assert check_template(byte_level_bpe(), TEMPLATES["llama3"]).startswith(
        "data.template llama3: <|start_header_id|>, <|end_header_id|>, <|eot_id|> are no single token"
    )


def test_a_begin_token_that_the_tokenizer_does_not_add_by_itself_is_not_expected():
    tokenizer = byte_level_bpe()
    tokenizer.bos_token = "<|endoftext|>"  # known, but not put in front
    own = TEMPLATES["vicuna"].jinja("<|endoftext|>", "<|im_end|>", tokenizer_adds_bos=False)
    assert own.count("<|endoftext|>") == 0
    tokenizer.chat_template = own
    assert match_tokenizer_template(tokenizer) == TEMPLATES["vicuna"]


# Orders of turns that clients send and nobody trains on


def turns(*roles):
    return tuple(Turn(role, (f"{role} {number}.",)) for number, role in enumerate(roles, 1))


LATER_SYSTEM = turns("user", "assistant", "system", "user")
GREETING = turns("assistant", "user")


def test_system_turns_may_come_later_and_replies_first_where_their_beginning_is_marked():
    def able(order):
        return [name for name, template in TEMPLATES.items() if template.why_not(order) is None]

    first = ["chatml", "internlm2", "llama2", "llama3", "vicuna", "alpaca"]
    assert [name for name in able(LATER_SYSTEM) if name in first] == ["chatml", "internlm2", "llama3"]
    assert [name for name in able(GREETING) if name in first] == ["chatml", "internlm2", "llama3", "vicuna", "alpaca"]
    assert able(turns("user", "assistant", "assistant", "user")) == able(GREETING)
    assert able(turns("system")) == [name for name in TEMPLATES if not TEMPLATES[name].system_in_first_user]
    assert able(turns("system", "user", "assistant", "user")) == list(TEMPLATES)


def test_a_later_system_turn_is_written_as_a_first_one():
    assert written("chatml", Conversation(LATER_SYSTEM)).endswith(
        "<|im_start|>system\nsystem 3.<|im_end|>\n<|im_start|>user\nuser 4.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("order", [LATER_SYSTEM, GREETING], ids=["later system", "greeting"])
def test_the_jinja_form_writes_the_same_order_or_refuses_it_too(name, order):
    tokenizer, template = sentencepiece_like(), TEMPLATES[name]
    tokenizer.chat_template = template.jinja("<s>", "</s>", tokenizer_adds_bos=True)
    messages = [{"role": turn.role, "content": turn.text} for turn in order]
    if template.why_not(order) is None:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == written(name, Conversation(order))
    elif order is LATER_SYSTEM:
        with pytest.raises(jinja2.TemplateError, match=f"{name} cannot write a turn of role system here"):
            tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_jinja_form_leaves_no_turn_out_in_silence():
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = TEMPLATES["chatml"].jinja("<s>", "</s>", tokenizer_adds_bos=True)
    with pytest.raises(jinja2.TemplateError, match="role tool"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}, {"role": "tool", "content": "5"}])


@pytest.mark.parametrize(
    ("name", "make"),
    [("chatml", byte_level_bpe), ("llama2", sentencepiece_like), ("vicuna", sentencepiece_like)],
    ids=["chatml", "llama2", "vicuna"],
)
def test_a_begun_reply_is_written_as_the_beginning_of_a_learned_one(name, make):
    """Up to the place where it was cut, where a tokenizer may have merged what stands on both sides."""
    tokens = ConversationTokenizer(make(), TEMPLATES[name])
    asked = Turn("user", ("Hi",))
    whole, _ = tokens.encode(Conversation((asked, Turn("assistant", ("A red circle.",)))))
    begun = tokens.prompt(Conversation((asked, Turn("assistant", ("A red",)))))
    assert tokens.text(whole).startswith(tokens.text(begun))
    assert tokens.text(begun).endswith("A red")
    assert begun[: len(tokens.prompt(Conversation((asked,))))] == tokens.prompt(Conversation((asked,)))
    assert len(begun) > len(tokens.prompt(Conversation((asked,))))
    for nothing in ((), (" \n",)):
        assert tokens.prompt(Conversation((asked, Turn("assistant", nothing)))) == tokens.prompt(Conversation((asked,)))
