"""The examples of docs/extending.md, working."""

import torch
from captions_file import Lines
from PIL import Image
from tokenizers_for_tests import byte_level_bpe
from torch import nn

from vlm.batch import IGNORE_INDEX, Batch, ImageSpec
from vlm.data.build import build_data
from vlm.data.config import DataConfig
from vlm.data.conversation import Conversation, Turn
from vlm.data.records import SOURCES
from vlm.data.template import EOS, ChatTemplate, RoleFormat
from vlm.data.tokenize import ConversationTokenizer
from vlm.models.families import FAMILIES, LLMFamily, LLMParts
from vlm.models.loss import chunked_cross_entropy
from vlm.models.pipeline import pipeline_layers, run_layers
from vlm.models.projector import Projector
from vlm.models.vision import VisionEncoder
from vlm.models.vlm import VisionLanguageModel


class ColourTower(nn.Module):
    """Mean colour of each quarter of the image: [N, 3, S, S] -> [N, 4, 3]."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, pixel_values):
        return nn.functional.adaptive_avg_pool2d(pixel_values, 2).flatten(2).transpose(1, 2) * self.scale


class FirstPatch(nn.Module):
    """A projector that keeps one token an image."""

    num_tokens = 1

    def __init__(self, in_width, out_width):
        super().__init__()
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, features):
        return self.linear(features[:, :1])


def tiny_llm():
    from vlm.compat import prepare

    prepare()
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def test_a_new_encoder_needs_only_a_module_from_pixels_to_features():
    encoder = VisionEncoder(ColourTower(), image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert (encoder.num_patches, encoder.width) == (4, 3)
    projector = Projector(num_patches=4, in_width=3, out_width=16)
    model = VisionLanguageModel(tiny_llm(), encoder, projector, image_token_id=99)
    ids = torch.tensor([[99] * 4 + [1, 2]])
    hidden = model(ids, torch.arange(6)[None], torch.rand(1, 3, 8, 8))
    assert hidden.shape == (1, 6, 16)


def test_a_new_projector_needs_only_its_number_of_tokens():
    encoder = VisionEncoder(ColourTower(), image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = VisionLanguageModel(tiny_llm(), encoder, FirstPatch(3, 16), image_token_id=99)
    hidden = model(torch.tensor([[99, 1, 2]]), torch.arange(3)[None], torch.rand(1, 3, 8, 8))
    hidden.sum().backward()
    assert model.projector.linear.weight.grad.abs().sum() > 0


def test_a_new_template_learns_its_replies():
    zephyr = ChatTemplate(
        "zephyr",
        user=RoleFormat("<|user|>\n", f"{EOS}\n"),
        assistant=RoleFormat("<|assistant|>\n", EOS),
        system=RoleFormat("<|system|>\n", f"{EOS}\n"),
        separator="\n",
        bos="never",
    )
    tokenizer = byte_level_bpe()
    example = ConversationTokenizer(tokenizer, zephyr)(
        Conversation((Turn("user", ("Hi",)), Turn("assistant", ("Yes.",))))
    )
    assert tokenizer.decode(example.input_ids) == "<|user|>\nHi<|im_end|>\n<|assistant|>\nYes.<|im_end|>\n"
    assert tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]) == "Yes.<|im_end|>"


def test_a_family_for_the_pipeline_is_a_line_in_its_record(monkeypatch):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    assert FAMILIES["olmo2"].parts is None
    monkeypatch.setitem(FAMILIES, "olmo2", LLMFamily(packs_by_positions=True, parts=LLMParts()))
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    llm = Olmo2ForCausalLM(Olmo2Config(**shape, num_attention_heads=2, pad_token_id=None))
    model = VisionLanguageModel(llm, None, None, image_token_id=None)
    ids = torch.arange(12).reshape(2, 6)
    batch = Batch(input_ids=ids, labels=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]))
    whole = chunked_cross_entropy(model(ids, batch.position_ids), batch.labels, model.logits)
    inputs, *blocks, output = pipeline_layers(model)
    assert len(blocks) == 3
    hidden_states = run_layers(model, [inputs, *blocks[:1]], batch)  # stage 0
    hidden_states = run_layers(model, [*blocks[1:], output], batch, hidden_states)
    assert chunked_cross_entropy(hidden_states, batch.labels, model.logits).item() == whole.item()


def test_a_new_kind_of_file_is_a_class_and_a_line(monkeypatch, tmp_path):
    monkeypatch.setitem(SOURCES, ".captions", lambda path, cache, name: Lines(path, name))
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "train.captions").write_text("a.png\tA cat.\nno tab\nb.png\tA dog.\nc.png\tA bird.\n")
    config = DataConfig.model_validate({
        "sources": [{"path": str(tmp_path / "train.captions")}], "template": "plain", "max_length": 64,
        "cache": str(tmp_path / "cache"), "max_skipped_share": 0.5,
    })  # fmt: skip
    tokenizer = byte_level_bpe()
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    spec = ImageSpec(8, (0.5,) * 3, (0.5,) * 3, num_tokens=2)
    data = build_data(config, tokenizer, spec, image_id, seed=0, global_batch_size=2, micro_batch_size=2)
    assert [(skip.rule, skip.where) for skip in data.skips] == [
        ("caption_missing", "train.captions: line 2"), ("image_missing", "train.captions: line 4"),
    ]  # fmt: skip
    (batch,) = next(data.train.iterate(0))
    assert sorted(batch.where) == ["train.captions: line 1", "train.captions: line 3"]
    assert batch.pixel_values.shape == (2, 3, 8, 8)
