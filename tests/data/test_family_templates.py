"""Each family's published format, written out: two questions and answers, with a system prompt and without."""

from __future__ import annotations

import pytest

from vlm.config import DataConfig
from vlm.data.config import TEMPLATE_ALIASES
from vlm.data.conversation import Conversation, Turn
from vlm.data.family_templates import FAMILY_TEMPLATES
from vlm.data.template import BOS, EOS, TEMPLATES, Piece, control_words

TALK = (Turn("user", ("Q1",)), Turn("assistant", ("A1",)), Turn("user", ("Q2",)), Turn("assistant", ("A2",)))
GENIE = (  # the sixteen of LLM-Genie
    "vanilla", "default", "llama2", "llama2_zh", "alpaca", "vicuna", "belle", "linly", "billa", "ziya", "aquila",
    "intern", "baichuan", "starchat", "chatml", "chatglm2",
)  # fmt: skip
XTUNER = (  # its `default` is called xtuner here, as LLM-Genie's is another one
    "zephyr", "internlm_chat", "internlm2_chat", "moss_sft", "llama2_chat", "code_llama_chat", "chatglm2", "chatglm3",
    "qwen_chat", "baichuan_chat", "baichuan2_chat", "wizardlm", "wizardcoder", "vicuna", "deepseek_coder",
    "deepseekcoder", "deepseek_moe", "deepseek_v2", "mistral", "mixtral", "minicpm", "gemma", "cohere_chat",
    "llama3_chat", "phi3_chat", "xtuner",
)  # fmt: skip
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
CURIOUS = "A chat between a curious {} and an artificial intelligence assistant. "
C = ("<|START_OF_TURN_TOKEN|><|{}_TOKEN|>", "<|END_OF_TURN_TOKEN|>")

# name: (all of it with the system prompt S, what stands before Q1 without one). <s> and </s> are the tokenizer's own
# tokens; a format that writes no end of a reply has </s> there, as it is learned.
PUBLISHED: dict[str, tuple[str, str]] = {
    # hparams of LLM-Genie
    "vanilla": ("<s>SQ1A1</s>Q2A2</s>", "<s>"),
    "default": (
        "<s>S\nHuman: Q1\nAssistant: A1</s>\nHuman: Q2\nAssistant: A2</s>\n",
        f"<s>{CURIOUS.format('user')}{POLITE.format('user')}\nHuman: ",
    ),
    # ymcui/Chinese-LLaMA-Alpaca-2
    "llama2_zh": (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s><s>",
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n",
    ),
    # BELLE-LLaMA-EXT-13B
    "belle": ("<s>S\n\nHuman: Q1\n\nBelle: A1</s>\n\nHuman: Q2\n\nBelle: A2</s>\n\n", "<s>Human: "),
    "linly": ("<s>S\nUser: Q1\nBot: A1</s>\nUser: Q2\nBot: A2</s>\n", "<s>User: "),  # CVI-SZU/Linly
    "billa": ("<s>S\nHuman: Q1\nAssistant: A1</s>\nHuman: Q2\nAssistant: A2</s>\n", "<s>Human: "),  # Neutralzz/BiLLa
    "ziya": ("<s>S\n<human>:Q1\n<bot>:A1</s>\n<human>:Q2\n<bot>:A2</s>\n", "<s><human>:"),  # Ziya-LLaMA-13B-v1
    "aquila": (  # AquilaChat-7B
        "<s>S###Human: Q1###Assistant: A1</s>###Human: Q2###Assistant: A2</s>###",
        f"<s>{CURIOUS.format('human')}{POLITE.format('human')}###Human: ",
    ),
    "intern": (  # internlm-chat-7b
        "<s><|System|>:S\n<|User|>:Q1<eoh>\n<|Bot|>:A1<eoa>\n<|User|>:Q2<eoh>\n<|Bot|>:A2<eoa>\n", "<s><|User|>:",
    ),
    # Baichuan-13B-Chat: ids 195 and 196; Baichuan2-Chat: <reserved_106> and 107, which have the same ids
    "baichuan": ("S<reserved_102>Q1<reserved_103>A1</s><reserved_102>Q2<reserved_103>A2</s>", "<reserved_102>"),
    "baichuan2": ("S<reserved_106>Q1<reserved_107>A1</s><reserved_106>Q2<reserved_107>A2</s>", "<reserved_106>"),
    "starchat": (  # starchat-beta, dialogues.py
        "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
        "<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n",
        "<|system|>\n<|end|>\n<|user|>\n",
    ),
    "chatglm2": (  # chatglm2-6b, build_prompt
        "[gMASK]sopS\n\n[Round 1]\n\n问：Q1\n\n答：A1</s>\n\n[Round 2]\n\n问：Q2\n\n答：A2</s>\n\n",
        "[gMASK]sop[Round 1]\n\n问：",
    ),
    "xtuner": ("<s><|System|>:S\n<|User|>:Q1\n<|Bot|>:A1</s>\n<|User|>:Q2\n<|Bot|>:A2</s>\n", "<s><|User|>:"),
    "zephyr": (  # zephyr-7b-beta, tokenizer_config.json
        "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n",
        "<|user|>\n",
    ),
    "moss_sft": (  # moss-moon-003-sft
        "S\n<|Human|>: Q1<eoh>\n<|MOSS|>: A1<eom>\n<|Human|>: Q2<eoh>\n<|MOSS|>: A2<eom>\n", "<|Human|>: ",
    ),
    "chatglm3": (  # chatglm3-6b, tokenizer_config.json: a line end and a blank after each role
        "[gMASK]sop<|system|>\n S<|user|>\n Q1<|assistant|>\n A1</s><|user|>\n Q2<|assistant|>\n A2</s>",
        "[gMASK]sop<|user|>\n ",
    ),
    "wizardcoder": (  # WizardCoder-15B-V1.0
        "<s>S\n\n### Instruction:\nQ1\n\n### Response:A1</s>\n\n### Instruction:\nQ2\n\n### Response:A2</s>\n\n",
        f"<s>{TASK}\n\n### Instruction:\n",
    ),
    "deepseek_coder": (  # deepseek-coder-6.7b-instruct, tokenizer_config.json
        "<s>S\n### Instruction:\nQ1\n### Response:\nA1\n<|EOT|>\n### Instruction:\nQ2\n### Response:\nA2\n<|EOT|>\n",
        "<s>You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, "
        "and you only answer questions related to computer science. For politically sensitive questions, security and "
        "privacy issues, and other non-computer science questions, you will refuse to answer\n### Instruction:\n",
    ),
    "deepseek_moe": (  # deepseek-moe-16b-chat and DeepSeek-V2-Chat, tokenizer_config.json
        "<s>S\n\nUser: Q1\n\nAssistant: A1</s>User: Q2\n\nAssistant: A2</s>", "<s>User: ",
    ),
    "mistral": ("<s>[INST] S\n\nQ1 [/INST]A1</s> [INST] Q2 [/INST]A2</s> ", "<s>[INST] "),  # Mistral-7B-Instruct-v0.1
    "gemma": (  # gemma-2b-it, tokenizer_config.json; the system prompt as in gemma-3
        "<s><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
        "<s><start_of_turn>user\n",
    ),
    "phi3": (  # Phi-3-mini-4k-instruct
        "<s><|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
        "<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n",
        "<s><|user|>\n",
    ),
    "cohere": (  # c4ai-command-r-v01
        "<s>" + "".join(f"{C[0].format(role)}{text}{C[1]}" for role, text in (
            ("SYSTEM", "S"), ("USER", "Q1"), ("CHATBOT", "A1"), ("USER", "Q2"), ("CHATBOT", "A2"))),
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    ),
    "minicpm": ("<s>S<用户>Q1<AI>A1</s><用户>Q2<AI>A2</s>", "<s><用户>"),  # MiniCPM-2B-sft
    "xverse": ("<s>S\n\nHuman: Q1\n\nAssistant: A1</s>Human: Q2\n\nAssistant: A2</s>", "<s>Human: "),  # XVERSE-13B-Chat
    "glm4": (  # glm-4-9b-chat
        "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>\nA1</s><|user|>\nQ2<|assistant|>\nA2</s>",
        "[gMASK]<sop><|user|>\n",
    ),
}  # fmt: skip


def written(name: str, system: str | None) -> str:
    pieces = TEMPLATES[name].render(Conversation(TALK), system=system)
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    return text.replace(BOS, "<s>").replace(EOS, "</s>")


@pytest.mark.parametrize("name", FAMILY_TEMPLATES)
def test_it_writes_what_the_family_published(name: str):
    expected, opening = PUBLISHED[name]
    assert written(name, "S") == expected
    assert written(name, None) == opening + expected[expected.index("Q1") :]


@pytest.mark.parametrize("name", [*GENIE, *XTUNER])
def test_the_names_of_llm_genie_and_xtuner_are_read(name: str):
    assert TEMPLATE_ALIASES.get(name, name) in TEMPLATES
    config = DataConfig.model_validate({"template": name, "sources": [{"path": "data.json"}]})
    assert config.template == TEMPLATE_ALIASES.get(name, name)


def test_what_a_family_has_single_tokens_for_is_said():
    assert control_words(TEMPLATES["intern"]) == ["<eoh>", "<eoa>"]  # <|User|> is text to its tokenizer
    assert control_words(TEMPLATES["zephyr"]) == []
    assert control_words(TEMPLATES["phi3"]) == ["<|system|>", "<|end|>", "<|user|>", "<|assistant|>"]


def test_questions_are_counted_where_the_format_says_so():
    assert "[Round 2]" in written("chatglm2", None)
    assert "[Round 3]" not in written("chatglm2", None)
