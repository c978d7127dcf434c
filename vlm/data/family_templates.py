"""Chat templates of model families, and of LLM-Genie and XTuner, as plain values; `TEMPLATES` takes them all.

`user`, `assistant` and `system` are (before, after, prefix) of a RoleFormat. Each is the format that the family
published; where that marks no end of a reply, the tokenizer's end token is it. Each is written out in
tests/data/test_family_templates.py.
"""

from __future__ import annotations

from typing import Any

_CURIOUS = "A chat between a curious {} and an artificial intelligence assistant. "
_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_DEEPSEEK_CODER = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer"
)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def _named(user: str, assistant: str, between: str, separator: str, **more: Any) -> dict[str, Any]:
    """ "Human: question" and "Assistant: reply", a blank after each name."""
    return {
        "user": (f"{user}:", between, " "), "assistant": (f"{assistant}:", "{eos}", " "), "system": ("", separator),
        "separator": separator, **more,
    }  # fmt: skip


def _baichuan(user: int, assistant: int) -> dict[str, Any]:
    words = (f"<reserved_{user}>", f"<reserved_{assistant}>")
    return {"user": (words[0],), "assistant": (words[1], "{eos}"), "bos": "never", "tokens": words}


# name -> fields of ChatTemplate; {bos} and {eos} stand for the tokenizer's tokens, {round} for the question's number
FAMILY_TEMPLATES: dict[str, dict[str, Any]] = {
    # LLM-Genie's; `default` is for models without a format of their own
    "vanilla": {"user": (), "assistant": ("", "{eos}")},
    "default": _named(
        "Human", "Assistant", "\n", "\n", default_system=_CURIOUS.format("user") + _POLITE.format("user")
    ),
    "llama2_zh": {
        "user": ("[INST] ", " [/INST]"), "assistant": ("", " {eos}", " "), "system": ("<<SYS>>\n", "\n<</SYS>>\n\n"),
        "separator": "{bos}", "bos": "always", "system_in_first_user": True,
        "default_system": "You are a helpful assistant. 你是一个乐于助人的助手。",
    },
    "belle": _named("Human", "Belle", "\n\n", "\n\n"),
    "linly": _named("User", "Bot", "\n", "\n"),
    "billa": _named("Human", "Assistant", "\n", "\n"),
    "ziya": {
        "user": ("<human>:", "\n"), "assistant": ("<bot>:", "{eos}"), "system": ("", "\n"), "separator": "\n",
        "tokens": ("<human>", "<bot>"),
    },
    "aquila": _named(
        "Human", "Assistant", "###", "###", default_system=_CURIOUS.format("human") + _POLITE.format("human")
    ),
    "intern": {
        "user": ("<|User|>:", "<eoh>\n"), "assistant": ("<|Bot|>:", "<eoa>"), "system": ("<|System|>:", "\n"),
        "separator": "\n", "bos": "always", "tokens": ("<eoh>", "<eoa>"),
    },
    "baichuan": _baichuan(102, 103),
    "starchat": {
        "user": ("<|user|>\n", "<|end|>\n"), "assistant": ("<|assistant|>", "<|end|>", "\n"),
        "system": ("<|system|>\n", "<|end|>\n"), "separator": "\n", "bos": "never", "default_system": "",
    },
    "chatglm2": {
        "start": "[gMASK]sop", "user": ("[Round {round}]\n\n问：", "\n\n"), "assistant": ("答：", "{eos}"),
        "system": ("", "\n\n"), "separator": "\n\n", "bos": "never", "tokens": ("[gMASK]", "sop"),
    },
    # XTuner's; its `default` is xtuner
    "xtuner": {
        "user": ("<|User|>:", "\n"), "assistant": ("<|Bot|>:", "{eos}"), "system": ("<|System|>:", "\n"),
        "separator": "\n", "tokens": (),
    },
    "zephyr": {
        "user": ("<|user|>\n", "{eos}\n"), "assistant": ("<|assistant|>\n", "{eos}"),
        "system": ("<|system|>\n", "{eos}\n"), "separator": "\n", "bos": "never", "tokens": (),
    },
    "moss_sft": {
        "user": ("<|Human|>:", "<eoh>\n", " "), "assistant": ("<|MOSS|>:", "<eom>", " "), "system": ("", "\n"),
        "separator": "\n", "bos": "never", "tokens": ("<eoh>", "<eom>"),
    },
    "chatglm3": {
        "start": "[gMASK]sop", "user": ("<|user|>\n", "", " "), "assistant": ("<|assistant|>\n", "{eos}", " "),
        "system": ("<|system|>\n", "", " "), "bos": "never", "tokens": ("[gMASK]", "sop", *_ROLES),
    },
    "baichuan2": _baichuan(106, 107),
    "wizardcoder": {
        "user": ("### Instruction:\n", "\n\n"), "assistant": ("### Response:", "{eos}"), "system": ("", "\n\n"),
        "separator": "\n\n", "default_system": _TASK,
    },
    "deepseek_coder": {
        "user": ("### Instruction:\n", "\n"), "assistant": ("### Response:\n", "\n<|EOT|>"), "system": ("", "\n"),
        "separator": "\n", "bos": "always", "default_system": _DEEPSEEK_CODER,
    },
    "deepseek_moe": {**_named("User", "Assistant", "\n\n", "\n\n", bos="always"), "separator": ""},
    "mistral": {
        "user": ("[INST] ", " [/INST]"), "assistant": ("", "{eos}"), "system": ("", "\n\n"), "separator": " ",
        "bos": "always", "system_in_first_user": True,
    },
    "gemma": {
        "user": ("<start_of_turn>user\n", "<end_of_turn>\n"), "assistant": ("<start_of_turn>model\n", "<end_of_turn>"),
        "system": ("", "\n\n"), "separator": "\n", "bos": "always", "system_in_first_user": True,
        "tokens": ("<start_of_turn>", "<end_of_turn>"),
    },
    "phi3": {
        "user": ("<|user|>\n", "<|end|>\n"), "assistant": ("<|assistant|>\n", "<|end|>"),
        "system": ("<|system|>\n", "<|end|>\n"), "separator": "\n",
    },
    "cohere": {
        "user": ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "assistant": ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "system": ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"), "bos": "always",
    },
    "minicpm": {"user": ("<用户>",), "assistant": ("<AI>", "{eos}"), "bos": "always", "tokens": ()},
    # of the families that `vlm convert legacy` writes, and are in neither
    "xverse": {**_named("Human", "Assistant", "\n\n", "\n\n"), "separator": ""},
    "glm4": {
        "start": "[gMASK]<sop>", "user": ("<|user|>\n",), "assistant": ("<|assistant|>\n", "{eos}"),
        "system": ("<|system|>\n",), "bos": "never", "tokens": ("[gMASK]", "<sop>", *_ROLES),
    },
}  # fmt: skip
