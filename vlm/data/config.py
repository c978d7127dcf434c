"""Config sections of the data package."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from vlm.schema import PathText, Section

TURN_NAMES = ("from", "value", "role", "content")  # of `columns`: keys of turns; the others are keys of records
_RECORD_NAMES = (
    "conversations", "messages", "image", "images", "caption", "text", "instruction", "input", "output", "query",
    "response", "question", "answer", "prompt", "completion", "context", "history", "system", "label", "loss", "weight",
    "chosen", "rejected", "solution", "ground_truth", "problem",
)  # fmt: skip


TemplateName = Literal[
    "plain", "chatml", "internlm2", "llama2", "llama3", "vicuna", "alpaca", "vanilla", "default", "llama2_zh",
    "belle", "linly", "billa", "ziya", "aquila", "intern", "baichuan", "starchat", "chatglm2", "xtuner", "zephyr",
    "moss_sft", "chatglm3", "baichuan2", "wizardcoder", "deepseek_coder", "deepseek_moe", "mistral", "gemma",
    "phi3", "cohere", "minicpm", "xverse", "glm4", "tokenizer",
]  # fmt: skip
# XTuner's and others' names of templates -> ours
TEMPLATE_ALIASES = {
    "internlm_chat": "intern", "internlm2_chat": "internlm2", "llama2_chat": "llama2", "code_llama_chat": "llama2",
    "llama3_chat": "llama3", "qwen_chat": "chatml", "baichuan_chat": "baichuan", "baichuan2_chat": "baichuan2",
    "wizardlm": "vicuna", "deepseekcoder": "deepseek_coder", "deepseek_v2": "deepseek_moe", "mixtral": "mistral",
    "phi3_chat": "phi3", "cohere_chat": "cohere",
}  # fmt: skip


def template_of(name: Any) -> Any:
    """
    >>> template_of("internlm2_chat"), template_of("chatml")
    ('internlm2', 'chatml')
    """
    return TEMPLATE_ALIASES.get(name, name) if isinstance(name, str) else name


class SourceConfig(Section):
    path: PathText
    """JSON, JSONL, CSV, TSV, .txt (each also .gz), a folder of images with captions, or a dataset_info.json."""
    dataset: str | None = None
    """Which entry of a dataset_info.json; null takes the only one."""
    images: PathText | None = None
    """Folder that every image must lie in; null means the folder of `path`."""
    links: tuple[PathText, ...] = ()
    """Folders outside `images` that links in it may lead to. A Hugging Face cache's own blobs need not be named."""
    format: Literal["auto", "conversation", "instruction", "marked_turns", "caption", "text"] = "auto"
    """The kind of every record; auto tells it by the keys (not marked_turns). See docs/data.md."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names of keys: ours -> the file's, such as {image: img_path}; from, value, role, content are of turns."""
    roles: dict[str, Literal["system", "user", "assistant"]] = Field(default_factory=dict)
    """Other names of roles: the file's -> ours."""
    weight: PositiveFloat = 1.0
    """How often each record appears per epoch; 0.5 takes another half every epoch."""
    prompt: str | None = None
    """Caption and text sources under a chat template: the user's turn that the caption answers."""

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in columns if name not in (*TURN_NAMES, *_RECORD_NAMES)]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not read; known: {', '.join((*TURN_NAMES, *_RECORD_NAMES))}")
        return columns


class DataConfig(Section):
    template: Annotated[TemplateName, BeforeValidator(template_of)] = "chatml"
    """"tokenizer" takes the tokenizer's own chat template, if one of ours renders the same. XTuner's names are
    read too, such as internlm2_chat."""
    system: str | None = None
    """System prompt for conversations that bring none; null means the template's default."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    eval_sources: tuple[SourceConfig, ...] = ()
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the records of `sources` kept from training for the held-out loss."""
    max_length: PositiveInt = 2048
    """Tokens per packed row, image tokens counted."""
    max_images: PositiveInt = 16
    """Images per packed row."""
    over_long: Literal["drop", "cut"] = "drop"
    """A record over max_length is dropped, or cut at the last turn boundary that fits."""
    packing: bool = True
    pack_window: PositiveInt = 512
    """Records among which best-fit packing chooses."""
    group_by_length: bool = False
    """Without packing: the records of a step are of similar length, so that little is padded. Order stays random."""
    drop_last: bool = False
    """Leave the rows out that do not fill the last step of an epoch, others each time; else that step is smaller."""
    share_images: bool = True
    """Records about one image stand in one row and share its tokens, where attention is varlen: the same losses in less
    time. Needs packing."""
    balance: bool = True
    """Deal the rows of each step to the data ranks so that all have equal work. The step's rows are the same."""
    workers: NonNegativeInt = 0
    """Processes that decode images, at most one per core; 0 decodes in the training process."""
    max_pixels: PositiveInt = 50_000_000
    """An image with more is skipped; read from its header before decoding. Pillow itself refuses above 179 million."""
    jpeg_draft: bool = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is at least twice the encoder's. Faster; pixels differ
    slightly from those that chat, server and evaluation see."""
    image_placement: Literal["exact", "auto"] = "auto"
    """auto: one image and no <image> mark in the record puts the image first. exact: that is an error."""
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """More skipped records than this share stops the run with exit code 3."""
    max_skipped_in_a_row: PositiveInt = 100
    """So many skipped records without a good one between them stop it too."""
    cache: PathText = "cache/features"
    """Where record indexes, length tables and encoder features are kept."""
    cache_features: bool | Literal["auto"] = False
    """Encode every image once, before training, and keep the frozen encoder's features on disk. auto: if faster."""
    cache_dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of those features, whatever the encoder computes in; bf16 rounds them to 8 bits of mantissa."""
    cache_size_gb: PositiveFloat | None = None
    """Bound of the features of all encoders in `cache`, 10^9 bytes; those not used for longest go. null means none."""

    @model_validator(mode="after")
    def _one_way_to_fill_rows(self) -> DataConfig:
        if self.group_by_length and self.packing:
            raise ValueError("group_by_length is the alternative to packing: set packing to false, or leave it out")
        return self
