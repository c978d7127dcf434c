"""Log-probabilities name each token as it stands in the text."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import byte_level_bpe, sentencepiece_like

from vlm.apps.api.choice import TokenSpeller
from vlm.generation.sampling import NewToken


@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_like])
@pytest.mark.parametrize("text", ["A red circle, and a blue one.", "这是一只猫。", "naïve 🙂"])
def test_the_bytes_of_all_tokens_are_the_text(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    spell = TokenSpeller(tokenizer, tokenizer.decode)
    spelled = [spell(NewToken(token, -1.0, ((token, -1.0),))) for token in ids]
    assert b"".join(bytes(token.bytes) for token in spelled).decode().lstrip(" ") == text
    assert spelled[0].top_logprobs[0].bytes == spelled[0].bytes
