"""An export is read back before it is called one: loaded from its folder and asked what the trained model was asked.

The trained model answers first and is let go; its answers are all that stays, so at no time do two copies lie in
memory. All computes in float32: weights of 16 bits are widened block by block, which leaves them as they are.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.artifacts.assemble import assemble_export, read_llava
from vlm.artifacts.base_models import with_bases_found
from vlm.artifacts.manifest import read_manifest
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.images import to_tiles
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import CheckpointError, VLMError
from vlm.generation.generate import GenerationSettings, generate
from vlm.inference.load import build_tokens
from vlm.models.build import Assembled
from vlm.models.decoders import find_blocks
from vlm.models.llm import choose_attention

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

NUM_NEW = 8  # greedy tokens
NUM_POSITIONS = 32  # whose logits are compared: the last of prompt and reply
TOLERANCE = 1e-3  # of the largest value; docs/exports.md has the worst seen
_NOT_KEPT = (
    "Nothing of it was kept. Usually a base model's folder was changed, or is of a kind that vlm cannot write yet"
)
_QUESTION = "What is shown here? 1, 2, 3"


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt, image placeholders included, and the pixels [1, 3, S, S] of its image, if it has one."""

    ids: list[int]
    pixels: Tensor | None


@dataclass(frozen=True)
class Answers:
    """What a model says to one question.

    Attributes:
        ids: of the question.
        stop_ids: tokens that end a reply.
        reply: greedy.
        features: float32 [1, T, D], the image as the language model gets it; None without an encoder.
        logits: float32 [NUM_POSITIONS or fewer, V], at the last positions of question and reply.
        values: float32 [NUM_POSITIONS or fewer], what a value head says there; None without one.
    """

    ids: list[int]
    stop_ids: frozenset[int]
    reply: list[int]
    features: Tensor | None
    logits: Tensor
    values: Tensor | None = None


def make_question(built: Assembled, tokens: ConversationTokenizer) -> Question:
    """About an image, if the model has an encoder and room for one. Whatever is drawn and asked is always the same."""
    text = Conversation((Turn("user", (_QUESTION,)),))
    if built.image_spec is None:  # the template plain writes no words of users: they are then a text to go on with
        begun = Conversation((*text.turns, Turn("assistant", (_QUESTION,))))
        return Question(tokens.prompt(text) or tokens.prompt(begun), None)
    encoded = io.BytesIO()
    _draw().save(encoded, format="PNG")  # read by those whose number of tokens depends on the size
    shown = Conversation((Turn("user", (IMAGE, f"\n{_QUESTION}")),), (encoded.getvalue(),))
    ids, pixels = tokens.prompt(shown), to_tiles(_draw(), built.image_spec)
    return Question(ids, pixels) if len(ids) < _most_tokens(built) else Question(tokens.prompt(text), None)


@torch.no_grad()
def ask(built: Assembled, tokens: ConversationTokenizer, like: Answers | None = None) -> Answers:
    """
    Args:
        built: on the CPU, in evaluation mode; it is afterwards as it was.
        like: answers to compare with: the logits are taken along the same reply.
    """
    model, features = built.model, None
    question = make_question(built, tokens)
    with in_float32(model.llm, model.vision, model.projector):
        if built.image_spec is not None:
            pixels = question.pixels if question.pixels is not None else to_tiles(_draw(), built.image_spec)
            features = model.encode_images(pixels).float()
        settings = GenerationSettings(max_new_tokens=max(1, min(NUM_NEW, _most_tokens(built) - len(question.ids))))
        reply = generate(model, question.ids, question.pixels, tokens.stop_ids, settings)
        ids = torch.tensor([question.ids + (reply if like is None else like.reply)])
        hidden_states = model(ids, torch.arange(ids.shape[1])[None], question.pixels)
        logits = model.logits(hidden_states[0, -NUM_POSITIONS:]).float()
        values = None if model.value_head is None else model.values(hidden_states[0, -NUM_POSITIONS:])
    return Answers(question.ids, frozenset(tokens.stop_ids), reply, features, logits, values)


@torch.no_grad()
def llava_logits(model: LlavaForConditionalGeneration, question: Question, reply: list[int]) -> Tensor:
    """What transformers' own class answers, as `Answers.logits`: float32 [NUM_POSITIONS or fewer, V]."""
    ids = torch.tensor([question.ids + reply])
    output = model(input_ids=ids, pixel_values=question.pixels, attention_mask=torch.ones_like(ids), use_cache=False)
    return output.logits[0, -NUM_POSITIONS:].float()


def check_readable(folder: Path, expected: Answers, dtype: torch.dtype) -> float:
    """Load an export from its folder, as `vlm.load` does, and compare its answers with the trained model's.

    Args:
        dtype: in which the language model is loaded.

    Returns:
        the largest difference of features and logits, relative to the largest of them.

    Raises:
        CheckpointError: it cannot be loaded, or answers in another way. Says how.
    """
    try:
        lines, worst = _read_again(folder, expected, dtype)
    except Exception as error:  # whatever it is, a reader of the folder would meet it too
        kind = "" if isinstance(error, VLMError) else f"{type(error).__name__}: "
        raise CheckpointError(f"the export cannot be read back: {kind}{str(error)[:600]}\n{_NOT_KEPT}") from error
    if lines:
        raise CheckpointError(
            "the export, read back, is not the model that was trained:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\n{_NOT_KEPT}"
        )
    return worst


def _read_again(folder: Path, expected: Answers, dtype: torch.dtype) -> tuple[list[str], float]:
    manifest, cpu = read_manifest(folder), torch.device("cpu")
    if manifest.model.vision is not None:  # what is fastest here is not what the trained model was asked in
        vision = manifest.model.vision.model_copy(update={"compute": "fp32"})
        manifest = replace(manifest, model=manifest.model.model_copy(update={"vision": vision}))
    manifest = with_bases_found(manifest, folder)
    built = assemble_export(folder, manifest, dtype, cpu)
    tokens = build_tokens(built, manifest, manifest.template)
    found = ask(built, tokens, expected)
    lines, worst = differences(expected, found), relative(expected.logits, found.logits)
    if expected.features is not None:
        worst = max(worst, relative(expected.features, found.features))
    if expected.values is not None:
        worst = max(worst, relative(expected.values, found.values))
    if lines or manifest.layout != "llava":
        return lines, worst
    question = make_question(built, tokens)
    del built
    whole = read_llava(folder, dtype, choose_attention(manifest.model.llm.attention, "cpu"))
    with in_float32(whole.model.language_model, whole):
        logits = llava_logits(whole, question, expected.reply)
    lines = compare(expected.logits, logits, "the logits of transformers' own class")
    return lines, max(worst, relative(expected.logits, logits))


def differences(expected: Answers, found: Answers) -> list[str]:
    """What an export answers in another way than the trained model, a line each; [] where it is the same.

    Args:
        found: asked with `like=expected`.
    """
    if expected.ids != found.ids:
        return [f"the tokenizer writes a question as {found.ids[:16]}, not as {expected.ids[:16]}"]
    lines = []
    if expected.stop_ids != found.stop_ids:
        lines.append(f"a reply ends at the tokens {sorted(found.stop_ids)}, not at {sorted(expected.stop_ids)}")
    if expected.features is not None:
        lines += compare(expected.features, found.features, "the features of an image")
    lines += compare(expected.logits, found.logits, "the logits")
    if expected.values is not None:
        lines += compare(expected.values, found.values, "the scores of the value head")
    if not lines and expected.reply != found.reply and not _is_tie(expected, found):
        lines.append(f"the greedy reply is {found.reply}, not {expected.reply}")
    return lines


def compare(expected: Tensor, found: Tensor | None, what: str) -> list[str]:
    """A line about two float32 tensors [...] that differ by more than TOLERANCE, or none."""
    found = _narrowed(expected, found)
    if found is None or expected.shape != found.shape:
        shape = "absent" if found is None else f"of shape {list(found.shape)}"
        return [f"{what} are {shape}, not of shape {list(expected.shape)}"]
    if relative(expected, found) <= TOLERANCE:
        return []
    worst, largest = float((expected - found).abs().max()), float(expected.abs().max())
    return [f"{what} differ by up to {worst:.3g}, of at most {largest:.3g}"]


def relative(expected: Tensor, found: Tensor | None) -> float:
    """The largest difference of two [...], relative to the largest value; infinite between tensors of two shapes."""
    found = _narrowed(expected, found)
    if found is None or expected.shape != found.shape:
        return math.inf
    return float((expected - found).abs().max()) / max(float(expected.abs().max()), 1e-12)


def _narrowed(expected: Tensor, found: Tensor | None) -> Tensor | None:
    """Logits [l, V] without rows that only fill the vocabulary up, as for the image placeholder in LLaVA's layout."""
    wider = found is not None and found.ndim == 2 and found.shape[-1] > expected.shape[-1]
    return found[:, : expected.shape[-1]] if found is not None and wider else found


@contextmanager
def in_float32(llm: Any, *others: nn.Module | None) -> Iterator[None]:
    """Let a model of 16-bit weights compute in float32, with no more than one block of it widened at a time.

    What lies outside the decoder's blocks, and `others`, is widened all the while. Afterwards all is as it was, to
    the bit: widening loses nothing.
    """
    blocks = list(find_blocks(llm).values())
    inside = {id(tensor) for block in blocks for tensor in _narrow(block)}
    with ExitStack() as stack:
        for module in (llm, *others):
            outside = [] if module is None else [tensor for tensor in _narrow(module) if id(tensor) not in inside]
            stack.callback(_narrower(outside))
            _widen(outside)
        for block in blocks:
            if tensors := _narrow(block):
                _widen_while_it_computes(block, tensors, stack)
        yield


def _widen_while_it_computes(block: nn.Module, tensors: list[Tensor], stack: ExitStack) -> None:
    """Hooks, removed by `stack`, that make 16-bit `tensors` [...] of a block float32 during its forward."""
    narrow = _narrower(tensors)
    hooks = (
        block.register_forward_pre_hook(lambda *_: _widen(tensors)),
        block.register_forward_hook(lambda *_: narrow(), always_call=True),
    )
    for hook in hooks:
        stack.callback(hook.remove)


def _narrow(module: nn.Module) -> list[Tensor]:
    """Its tensors [...] of 16-bit floats."""
    tensors = (*module.parameters(), *module.buffers())
    return [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]


def _widen(tensors: list[Tensor]) -> None:
    """Tensors of any shape [...] become float32, in place."""
    for tensor in tensors:
        tensor.data = tensor.data.float()


def _narrower(tensors: list[Tensor]) -> Any:
    """What brings tensors [...] back to the number formats that they have now."""
    before = [tensor.dtype for tensor in tensors]

    def narrow() -> None:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to(dtype)

    return narrow


def _is_tie(expected: Answers, found: Answers) -> bool:
    """Whether two replies part where the trained model holds both tokens for as likely."""
    pairs = zip(expected.reply, found.reply, strict=False)
    place = next(
        (n for n, (one, other) in enumerate(pairs) if one != other), min(len(expected.reply), len(found.reply))
    )
    row = expected.logits[place - len(expected.reply) - 1]
    said = found.reply[place : place + 1] or [token for token in found.stop_ids if token < len(row)]
    return bool(said) and float(row.max() - row[said].max()) <= 2 * TOLERANCE * float(row.abs().max())


def _most_tokens(built: Assembled) -> int:
    config = built.model.llm.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def _draw() -> Image.Image:
    """Smooth and sharp parts of all colours, not square."""
    size = (80, 60)
    red, green = Image.linear_gradient("L").resize(size), Image.radial_gradient("L").resize(size)
    blue = Image.linear_gradient("L").rotate(90).resize(size)
    blue.paste(255, (10, 10, 30, 40))
    return Image.merge("RGB", (red, green, blue))
