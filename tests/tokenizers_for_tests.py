"""Tiny tokenizers made on the spot: byte-level BPE with ChatML's control tokens, and a SentencePiece-like one."""

from __future__ import annotations

import io
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA red circle.<|im_end|>\n",
    "system You are a helpful assistant. A dog, a cat and a blue square.",
    "USER: Hello ASSISTANT: Hi there, how are you? [INST] <<SYS>> ### Instruction: ### Response:",
    "这是什么？红色的圆。",
] * 4


def byte_level_bpe(texts: Iterable[str] = TEXTS, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Like Qwen's and SmolLM2's. `<special>` is an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken("<added>", special=False, normalized=False)])
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def sentencepiece_like(texts: Iterable[str] = TEXTS) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a blank before the text, <s> put in front by the tokenizer itself."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + byte_tokens, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


LINES = [line for text in TEXTS[:4] for line in text.splitlines()] * 8
LLAMA = {  # settings of the vocabularies of Llama, InternLM and Baichuan
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True,
    "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True,
}  # fmt: skip


def sentencepiece_model(kind: str = "bpe", vocab_size: int = 420, **options: object) -> bytes:
    """A real SentencePiece model as a `tokenizer.model` file holds it. Kinds: bpe, unigram, word, char."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    settings = {**LLAMA, "hard_vocab_limit": False, "minloglevel": 2, **options}
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, model_type=kind, vocab_size=vocab_size, **settings
    )
    return written.getvalue()
