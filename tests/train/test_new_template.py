"""A chat template that only this test knows: learned, planned, resumed, exported, asked, served, rendered elsewhere."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
from walk import QUESTION, walk

from vlm.batch import IGNORE_INDEX
from vlm.config import RunConfig, load_config
from vlm.data.config import DataConfig
from vlm.data.conversation import Conversation, Turn
from vlm.data.template import TEMPLATES, ChatTemplate, RoleFormat, match_tokenizer_template
from vlm.data.tokenize import ConversationTokenizer
from vlm.models.folder import read_vocabulary

KNOWN = get_args(DataConfig.model_fields["template"].annotation)
END = "<|endoftext|>"  # of a reply; the tokenizer's own end token is <|im_end|>

LETTER = ChatTemplate(
    "letter",
    user=RoleFormat("Dear model,\n", "\n"),
    assistant=RoleFormat("Dear user,\n", END),
    system=RoleFormat("P.S. ", "\n"),
    separator="\n",
    bos="never",
    default_system="Be brief.",
)


@pytest.fixture
def known(monkeypatch):
    """Its line in the dict, and its name among the templates."""

    def rebuild(*names: str) -> None:
        DataConfig.model_fields["template"].annotation = Literal[names]
        for section in (DataConfig, RunConfig):
            section.model_rebuild(force=True)

    monkeypatch.setitem(TEMPLATES, "letter", LETTER)
    rebuild(*KNOWN, "letter")
    yield
    rebuild(*KNOWN)


def test_the_config_names_every_template():
    assert get_args(DataConfig.model_fields["template"].annotation) == (*TEMPLATES, "tokenizer")


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_it_needs_nothing_but_its_line(config_file, tiny, capsys):
    path = config_file(data__template="letter", data__max_length=128, train__max_steps=4, train__save_every=2)
    assert load_config(path).data.template == "letter"
    image = next((tiny / "data/images").glob("*.png"))
    walked = walk(path, image, capsys)
    loaded, end = walked.loaded, read_vocabulary(tiny / "llm").ids[END]

    turns = Conversation((Turn("user", ("Hi",)), Turn("assistant", ("Yes.",))))
    example = ConversationTokenizer(loaded.tokenizer, LETTER)(turns)
    learned = [label for label in example.labels if label != IGNORE_INDEX]
    assert loaded.tokenizer.decode(learned) == f"Yes.{END}"  # the model learns to end its letters

    assert loaded.conversation_tokenizer.stop_ids >= {end}  # and chat and server end them there
    assert loaded.tokenizer.eos_token == END
    assert "| chat template | letter |" in walked.card
    prompt = loaded.tokenizer.decode(walked.prompt)
    assert prompt == "P.S. Be brief.\nDear model,\n" + "<image>" * 16 + f"\n{QUESTION}\nDear user,\n"

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    elsewhere = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert elsewhere == prompt.replace("<image>" * 16, "<image>")  # transformers writes the same
    assert match_tokenizer_template(loaded.tokenizer) == LETTER  # `template: tokenizer` finds it again
