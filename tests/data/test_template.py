import pytest
from tokenizers_for_tests import byte_level_bpe, sentencepiece_like

from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.template import BOS, EOS, TEMPLATES, Piece, match_tokenizer_template
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
