"""Export -> a model to talk to.

Nothing but safetensors and JSON is read, and no code of an export is ever run.
"""

from __future__ import annotations

import difflib
import math
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlm.artifacts.adapted_vocabulary import tokenizer_place
from vlm.artifacts.adapter import Adapter, is_of_export, read_adapter
from vlm.artifacts.assemble import OnProgress, assemble_export
from vlm.artifacts.base_models import with_bases_found, with_start_found
from vlm.artifacts.manifest import Manifest
from vlm.artifacts.peft_adapter import PeftAdapter, is_peft, read_peft
from vlm.artifacts.plain import describe, is_plain, read_model, with_template
from vlm.batch import ImageSpec
from vlm.compat import prepare
from vlm.data.build import build_template
from vlm.data.config import template_of
from vlm.data.conversation import Conversation
from vlm.data.image_order import ImageOrder
from vlm.data.images import load_image, to_tiles
from vlm.data.template import TEMPLATES, ChatTemplate
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import CheckpointError, ConfigError, RecordError
from vlm.generation.generate import GenerationSettings, generate
from vlm.generation.streaming import CONTEXT, TextStream
from vlm.inference.messages import ImageInput, Messages, to_conversation
from vlm.inference.placement import check_device_map, spread
from vlm.inference.quantize import check_bits, quantize_linears
from vlm.logs import log
from vlm.models.build import Assembled
from vlm.models.config import ModelConfig
from vlm.models.vlm import VisionLanguageModel
from vlm.precision import DTYPES, autocast, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_SETTINGS = {field.name for field in fields(GenerationSettings)}
_END = object()


@dataclass(frozen=True)
class LoadedModel:
    """An export in memory, in evaluation mode. See `load`."""

    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerFast
    conversation_tokenizer: ConversationTokenizer
    image_spec: ImageSpec | None  # None: a plain language model
    image_token_id: int | None
    config: ModelConfig
    system: str | None
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def template(self) -> ChatTemplate:
        return self.conversation_tokenizer.template

    @property
    def max_tokens(self) -> int:
        """Tokens, prompt and reply, that the language model was made for."""
        return int(getattr(self.model.llm.config, "max_position_embeddings", None) or 1 << 20)

    def describe_compute(self) -> str:
        """In which number formats it computes, for a log."""
        (name,) = [name for name, dtype in DTYPES.items() if dtype == self.compute_dtype]
        vision = self.model.vision
        own = "" if vision is None or vision.compute is None else f", vision encoder {vision.compute.name}"
        return f"computes in {name}{own} on {self.device.type}"

    def autocast(self) -> AbstractContextManager[Any]:
        """What every forward runs under."""
        return autocast(self.device.type, self.compute_dtype)

    def chat(
        self,
        messages: Messages,
        images: ImageInput | Sequence[ImageInput] = (),
        stop: str | Sequence[str] = (),
        **settings: Any,
    ) -> str:
        """The reply to a question or a list of messages; see `to_conversation` for both forms.

        Args:
            messages: a plain string, or messages as OpenAI's API writes them. A reply at their end is gone on with.
            images: paths or PIL images, shown before the first question unless the messages place them.
            stop: texts that end the reply; they are not part of it.
            settings: fields of `GenerationSettings`, e.g. max_new_tokens=64, do_sample=True, seed=1.

        Raises:
            RecordError: an image or a message cannot be used.
            ConfigError: an unknown setting, or the conversation is longer than the model can read.
        """
        conversation = to_conversation(messages, images, self.template)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        reply = "".join(self.stream(conversation, make_settings(settings), stop))
        return reply.rstrip() if conversation.begun_reply else reply.strip()

    def stream(
        self,
        conversation: Conversation,
        settings: GenerationSettings | None = None,
        stop: Sequence[str] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, None]:
        """The reply as it grows: pieces of text, each of whole characters, none empty.

        Closing the iterator ends the generation.

        Args:
            conversation: ends with a question, or with the beginning of the reply.
            should_stop: asked before every token; may answer from another thread.

        Raises:
            RecordError, ConfigError: as `chat`, at once and not at the first piece.
        """
        settings = settings or GenerationSettings()
        input_ids = self.conversation_tokenizer.prompt(conversation)
        if not input_ids:
            raise ConfigError(
                "the prompt has no tokens: template plain writes images only. Show an image, or choose another "
                "template with --prompt-template"
            )
        left = self.max_tokens - len(input_ids)
        if left < 1:
            raise ConfigError(
                f"the conversation has {len(input_ids):,} tokens ({len(conversation.images)} images included), the "
                f"model reads at most {self.max_tokens:,}. Clear it, or ask again with fewer turns or images"
            )
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, left))
        before = input_ids[-CONTEXT:] if conversation.begun_reply else ()
        text = TextStream(self.conversation_tokenizer.decode, stop, before)
        return self._stream(input_ids, self._pixels(conversation), settings, text, should_stop)

    def _pixels(self, conversation: Conversation) -> Tensor | None:
        """float32 [N, 3, S, S] of the tiles of all images, on the model's device; None without images."""
        if not conversation.images:
            return None
        if self.image_spec is None:
            raise RecordError("image_without_encoder", "this model reads no images: it has no vision encoder")
        background = self.image_spec.background
        opened = [load_image(image, background=background) for image in conversation.images]
        return torch.cat([to_tiles(image, self.image_spec) for image in opened]).to(self.device)

    def _stream(
        self,
        input_ids: list[int],
        pixel_values: Tensor | None,
        settings: GenerationSettings,
        text: TextStream,
        should_stop: Callable[[], bool],
    ) -> Generator[str, None, None]:
        """transformers generates with callbacks; a thread and a queue turn them into an iterator.

        Args:
            pixel_values: [N, 3, S, S] of the prompt's images; None without images.
        """
        pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        closed = threading.Event()
        seen = 0

        def on_token(token: int) -> bool:
            nonlocal seen
            seen += 1
            pieces.put(text.push(token))
            return not text.stopped

        def is_over() -> bool:
            return closed.is_set() or should_stop()

        def work() -> None:
            try:
                with self.autocast():  # autocast is a setting of the thread
                    stop_ids = self.conversation_tokenizer.stop_ids
                    ids = generate(self.model, input_ids, pixel_values, stop_ids, settings, on_token, is_over)
                for token in ids[seen:]:  # beams give all tokens at the end
                    pieces.put(text.push(token))
                pieces.put(text.finish())
                pieces.put(_END)
            except BaseException as error:  # raised again where the reply is read
                pieces.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not _END:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            closed.set()
            worker.join()


def load(
    path: str | Path,
    device: str = "auto",
    precision: Precision = "auto",
    *,
    adapter: str | Path | None = None,
    template: str | None = None,
    image_order: ImageOrder | None = None,
    bits: int | None = None,
    device_map: str | None = None,
    offload_folder: str | Path | None = None,
    on_progress: OnProgress = lambda fraction: None,
) -> LoadedModel:
    """Load an export: what a run trained beside its base models, or a full one by itself. Or a plain model folder.

    Args:
        path: the folder that `vlm export` wrote; or a language model in transformers' layout, or a LLaVA in it. Base
            models that an export names by relative paths are looked for below the current folder, then below the
            folders above the export.
        device: "cpu", "cuda", "cuda:1"; "auto" takes the GPU if there is one.
        precision: "auto" computes in bfloat16 where the hardware does so natively, else in float32.
        adapter: a LoRA folder that peft wrote, whose tokenizer is taken if it brings one. Or another export, whose LoRA
            adapter is added to this one's before both are merged; if it went on training this one's adapter
            (init_from), it replaces that. A plain model folder is then asked with that export's template, system
            prompt and end tokens.
        template: chat template, by name, instead of the export's.
        image_order: where the images of a user turn are put, before its words ("first"), after them ("last"), or as
            they come ("keep"); None does as the training data did, which the export says.
        bits: 8 or 4 keeps the language model's linear layers in so many bits, by bitsandbytes.
        device_map: "auto" spreads the language model over all GPUs, then main memory, then `offload_folder`. The
            weights pass through main memory.
        offload_folder: with `device_map`, for layers that fit in no memory.
        on_progress: called with the share that is done, 0..1, after each part.

    Raises:
        CheckpointError: no export and no model; damaged; of another format version; a base model is missing or holds
            other weights; a tensor does not fit (each is listed).
        ConfigError: options that contradict each other, or that this machine cannot do.

    >>> import vlm
    >>> model = vlm.load(export)
    >>> reply = model.chat("What is this?", images=["cat.png"], max_new_tokens=8)
    >>> isinstance(reply, str)
    True
    >>> image = {"type": "image_url", "image_url": {"url": "cat.png"}}
    >>> question = {"type": "text", "text": "What is this?"}
    >>> reply == model.chat([{"role": "user", "content": [image, question]}], max_new_tokens=8)
    True
    """
    return load_kind(
        path, device, precision, adapter=adapter, template=template, image_order=image_order, bits=bits,
        device_map=device_map, offload_folder=offload_folder, on_progress=on_progress,
    )  # fmt: skip


def load_kind(
    path: str | Path,
    device: str = "auto",
    precision: Precision = "auto",
    *,
    is_reward: bool = False,
    adapter: str | Path | None = None,
    template: str | None = None,
    image_order: ImageOrder | None = None,
    bits: int | None = None,
    device_map: str | None = None,
    offload_folder: str | Path | None = None,
    on_progress: OnProgress = lambda fraction: None,
) -> LoadedModel:
    """`load`, of a model that writes or, with `is_reward`, of one that scores replies.

    Raises:
        CheckpointError: also where the folder holds the other kind.
    """
    target = torch.device(choose_device(device))
    dtype = choose_dtype(precision, target)
    check_bits(bits, target)
    check_device_map(device_map, offload_folder, device)
    prepare()
    folder = Path(path)
    manifest = read_model(folder)
    _refuse_other_kind(folder, manifest, is_reward)
    other = None if adapter is None else _read_adapter(Path(adapter), folder, manifest)
    if isinstance(other, Adapter) and is_plain(folder):
        manifest = _asked_as_trained(manifest, other)
    tokenizer = _brought_tokenizer(other, folder)
    if tokenizer is not None and is_plain(folder):
        manifest = with_template(manifest, tokenizer)
    name = known_template(template or manifest.template)
    found = with_bases_found(manifest, folder)
    built = assemble_export(folder, found, dtype, target, other, on_progress, tokenizer=tokenizer)
    if bits is not None:
        quantize_linears(built.model.llm, bits, dtype, torch.device("cpu") if device_map else target)
    if device_map is not None:
        target = spread(built.model, offload_folder, only_cpu=target.type == "cpu")
    else:
        built.model.to(target)
    try:
        tokens = build_tokens(built, manifest, name, image_order)
    except ConfigError as error:  # of an export the template is known
        raise ConfigError(f"{folder}: {error}. With a command: --prompt-template NAME") from None
    on_progress(1.0)
    _tell_found(folder, manifest, tokens.template.name, other)
    return LoadedModel(
        model=built.model,
        tokenizer=built.tokenizer,
        conversation_tokenizer=tokens,
        image_spec=manifest.image_spec,
        image_token_id=built.image_token_id,
        config=found.model,
        system=manifest.system,
        device=target,
        compute_dtype=dtype,
    )


def _tell_found(folder: Path, manifest: Manifest, template: str, other: Adapter | PeftAdapter | None) -> None:
    """What was found where no export says it: in a plain model folder, in an adapter of peft."""
    if is_plain(folder) or isinstance(other, PeftAdapter):
        kind = f"{describe(manifest)}, template {template}" if is_plain(folder) else "an export"
        log(f"{folder}: {kind}" + (f"; with the adapter {_name_of(other)}" if other is not None else ""))


def _refuse_other_kind(folder: Path, manifest: Manifest, is_reward: bool) -> None:
    if is_reward == manifest.scores:
        return
    if is_reward:
        raise CheckpointError(
            f"{folder} is not a reward model: it has no value head. Train one with objective: {{kind: reward}} and "
            "value_head in model.trainable, and export it (docs/preferences.md)"
        )
    raise CheckpointError(
        f"{folder} is a reward model: it scores replies and writes none, so chat, serve, webui and eval cannot use it. "
        f"Score replies with `vlm predict {folder} --data FILE`, or vlm.inference.reward.load_reward_model"
    )


def _read_adapter(adapter: Path, folder: Path, manifest: Manifest) -> Adapter | PeftAdapter:
    if is_peft(adapter) and not is_of_export(adapter):
        return read_peft(adapter)
    return with_start_found(read_adapter(adapter, folder, manifest), folder, manifest)


def _brought_tokenizer(adapter: Adapter | PeftAdapter | None, folder: Path) -> Path | None:
    """Where the tokenizer lies with which another program's adapter was trained, of models that `vlm merge` takes."""
    is_one_model = (folder / "config.json").is_file()
    return tokenizer_place(adapter, folder) if isinstance(adapter, PeftAdapter) and is_one_model else None


def _asked_as_trained(manifest: Manifest, adapter: Adapter) -> Manifest:
    """A plain base model is asked as the run that trained the adapter asked it, not as its own template says."""
    theirs = adapter.manifest
    return replace(
        manifest,
        template=theirs.template,
        system=theirs.system,
        stop_ids=theirs.stop_ids,
        begins=theirs.begins,
        image_order=theirs.image_order,
    )


def _name_of(adapter: Adapter | PeftAdapter) -> str:
    """For a log."""
    if isinstance(adapter, PeftAdapter):
        return adapter.describe()
    return f"and the prompts of the export {adapter.folder}"


def build_tokens(
    built: Assembled, manifest: Manifest, template_name: str, image_order: ImageOrder | None = None
) -> ConversationTokenizer:
    """How an export's prompts are written, and what ends its replies; arguments as for `load`."""
    template, spec = build_template(template_name, built.tokenizer), manifest.image_spec
    template = replace(template, image_order=image_order or manifest.image_order)
    if template.bos == "tokenizer" and manifest.begins is not None:  # the exported tokenizer leaves it to the template
        template = replace(template, bos="always" if manifest.begins else "never")
    tokens = ConversationTokenizer(
        built.tokenizer,
        template,
        image_token_id=built.image_token_id,
        tokens_per_image=spec or 0,
        system=manifest.system,
    )
    tokens.stop_ids |= set(manifest.stop_ids)
    return tokens


def make_settings(values: dict[str, Any]) -> GenerationSettings:
    """Raises ConfigError for an unknown name or a value out of range."""
    unknown = sorted(values.keys() - _SETTINGS)
    if unknown:
        known = ", ".join(sorted(_SETTINGS))
        raise ConfigError(f"unknown generation setting {', '.join(unknown)}; known: {known}, stop")
    settings = GenerationSettings(**values)
    if settings.max_new_tokens < 1 or settings.num_beams < 1:
        raise ConfigError("max_new_tokens and num_beams must be at least 1")
    if settings.max_length is not None and settings.max_length < 1:
        raise ConfigError(f"max_length {settings.max_length}: expected a number of tokens, at least 1")
    if not math.isfinite(settings.length_penalty):
        raise ConfigError(f"length_penalty {settings.length_penalty:g}: expected a number; 1 is the usual one")
    if not 0 < settings.repetition_penalty < math.inf:
        raise ConfigError(f"repetition_penalty {settings.repetition_penalty:g}: expected a number over 0; 1 is none")
    if settings.seed is not None and not 0 <= settings.seed < 1 << 63:
        raise ConfigError(f"seed {settings.seed}: expected 0 or more, below 2^63")
    if settings.do_sample and not (
        0 < settings.temperature < math.inf and 0 < settings.top_p <= 1 and settings.top_k >= 0
    ):
        raise ConfigError("sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0")
    return settings


def choose_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: torch sees no GPU here. Use auto or cpu; `vlm doctor` shows what is there")
    return name


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Raises ConfigError for an unknown name, and for float16 on a CPU."""
    if precision not in ("auto", *DTYPES):
        raise ConfigError(f"dtype {precision!r} is not known; there are auto, {', '.join(DTYPES)}")
    return DTYPES[resolve(precision, device)]


def known_template(name: str) -> str:
    name = template_of(name)
    if name != "tokenizer" and name not in TEMPLATES:
        known = [*TEMPLATES, "tokenizer"]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"chat template {name!r} is not known; {hint}There are {', '.join(known)}")
    return name
