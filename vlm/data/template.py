"""Chat templates: a conversation -> pieces of text, each known to be control or content, reply or not.

Control pieces are the template's own words and may become special tokens. Content is what a person or a data file
wrote and never does. The end-of-reply token belongs to the reply: the model learns to stop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jinja2

from vlm.data.conversation import IMAGE, Conversation, ImageSlot, Role, Turn, join_texts
from vlm.data.family_templates import FAMILY_TEMPLATES
from vlm.data.image_order import ImageOrder, arrange_images
from vlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS = "{bos}", "{eos}"  # stand for the tokenizer's own tokens inside control pieces
ROUND = "{round}"  # in what stands before a user's turn: its number, from 1
_CONTROL_WORD = re.compile(r"<\|\w+\|>")  # Llama 2's [INST] and <<SYS>> are plain text to its tokenizer too


class Piece(NamedTuple):  # made ten times a record, and cheaper than a dataclass
    text: str
    is_control: bool = False
    is_reply: bool = False


@dataclass(frozen=True)
class RoleFormat:
    """`before` and `after` are control text; `prefix` is white space that belongs to the content."""

    before: str = ""
    after: str = ""
    prefix: str = ""


@dataclass(frozen=True)
class ChatTemplate:
    """How one family of models writes a conversation down."""

    name: str
    user: RoleFormat
    assistant: RoleFormat  # `after` ends the reply and is learned
    system: RoleFormat = RoleFormat()
    separator: str = ""  # control text after a reply, not learned
    bos: Literal["always", "never", "tokenizer"] = "tokenizer"  # "tokenizer": if it adds one by itself
    default_system: str | None = None
    system_in_first_user: bool = False  # llama2: the system text stands inside the first user turn
    only_images_of_user: bool = False  # plain: what the user says is left out, images stay
    # without repr: fingerprints of runs from before these fields stay
    start: str = field(default="", repr=False)  # control text before everything but the begin token
    tokens: tuple[str, ...] | None = field(default=None, repr=False)
    """Control words that are single tokens of the family; None: all that look like <|word|>."""
    # where the images of a user turn are put
    image_order: ImageOrder = field(default="keep", repr=False)

    def render(
        self, conversation: Conversation, system: str | None = None, add_generation_prompt: bool = False
    ) -> list[Piece | ImageSlot]:
        """The conversation as pieces, in order; empty ones are left out.

        Args:
            system: used when the conversation has no system turn; None takes the template's default, if any.
            add_generation_prompt: end with what stands before a reply.
        """
        turns = list(conversation.turns)
        if turns and turns[0].role == "system":
            system = turns.pop(0).text
        elif system is None:
            system = self.default_system
        pieces: list[Piece | ImageSlot] = [Piece(BOS, is_control=True)] if self.bos != "never" else []
        pieces.append(Piece(self.start, is_control=True))
        head = [] if system is None or self.only_images_of_user else self._system(system)
        if not self.system_in_first_user:
            pieces += head
            head = []
        num_users = 0
        for turn in turns:
            num_users += turn.role == "user"
            pieces += self._turn(turn, head, num_users)
            head = []
        if conversation.goes_on:  # without what ends the last reply
            del pieces[-2:]
        if add_generation_prompt:
            pieces.append(Piece(self.assistant.before, is_control=True))
        return [piece for piece in pieces if isinstance(piece, ImageSlot) or piece.text]

    def leaves_out(self, conversation: Conversation) -> tuple[str, ...]:
        """What of a conversation is not written down, beyond the words with the first image.

        >>> turns = [Turn("user", (IMAGE, "What?")), Turn("assistant", ("A dog.",)), Turn("user", ("Sure?",))]
        >>> TEMPLATES["plain"].leaves_out(Conversation(tuple(turns)))
        ("questions (template plain writes the user's images only)",)
        """
        if not self.only_images_of_user:
            return ()
        roles = [turn.role for turn in conversation.turns]
        users = [turn for turn in conversation.turns if turn.role == "user"]
        is_silent = all(not turn.text.strip() or (turn is users[0] and turn.num_images) for turn in users)
        why = f"(template {self.name} writes the user's images only)"
        left_out = [] if is_silent else [f"questions {why}"]
        return tuple([*left_out, f"system prompts {why}"] if "system" in roles else left_out)

    @property
    def stop(self) -> str:
        """Control text that ends a reply."""
        return self.assistant.after

    def why_not(self, turns: Sequence[Turn]) -> str | None:
        """Why turns in this order cannot be written with this template; None when they can.

        Beyond the order that is trained on (a system turn first, then user and assistant in turns), replies may come
        first or in a row and system turns later, where the template marks the beginning of such a turn.

        >>> TEMPLATES["llama2"].why_not([Turn("assistant", ("Hello!",)), Turn("user", ("Hi",))])
        'turn 1 is an assistant turn without a user turn before it, which the template llama2 cannot write'
        """
        before = "system"
        for number, turn in enumerate(turns, 1):
            if turn.role == "system" and number > 1 and not self._can_repeat_system:
                return f"turn {number} is a system turn; with the template {self.name} it may only come first"
            if turn.role == "assistant" and before != "user" and not self.assistant.before:
                return (
                    f"turn {number} is an assistant turn without a user turn before it, which the template "
                    f"{self.name} cannot write"
                )
            before = turn.role
        if self.system_in_first_user and turns[0].role == "system" and all(turn.role != "user" for turn in turns):
            return f"there is no user turn, in which the template {self.name} writes the system text"
        return None

    @property
    def _can_repeat_system(self) -> bool:
        """Whether a system turn stands between marks of its own, so that it is told from what is around it."""
        return bool(self.system.before) and not self.system_in_first_user and not self.only_images_of_user

    def jinja(self, bos_token: str | None, eos_token: str | None, tokenizer_adds_bos: bool) -> str:
        """The same template in the form that transformers keeps in chat_template.jinja.

        Replies stand between generation markers, so that assistant masks can be made from it. Images in a list of
        content parts become `<image>`, and the words after one stand on a line of their own, as in training data; with
        an `image_order`, images of a user turn are put before or after its words.
        """
        with_bos = self.bos == "always" or (self.bos == "tokenizer" and tokenizer_adds_bos)
        return _jinja(self, (bos_token or "") if with_bos else "", bos_token or "", eos_token or "")

    def _system(self, text: str) -> list[Piece | ImageSlot]:
        return [
            Piece(self.system.before, is_control=True),
            Piece(self.system.prefix + text),
            Piece(self.system.after, is_control=True),
        ]

    def _turn(self, turn: Turn, head: list[Piece | ImageSlot], number: int) -> Iterator[Piece | ImageSlot]:
        if turn.role == "assistant":
            yield Piece(self.assistant.before, is_control=True)
            yield Piece(self.assistant.prefix + turn.text, is_reply=turn.is_learned)
            yield Piece(self.assistant.after, is_control=True, is_reply=turn.is_learned)
            yield Piece(self.separator, is_control=True)
            return
        if turn.role == "system":  # not the first turn: `why_not` says where that can be written
            yield from self._system(turn.text)
            return
        yield Piece(self.user.before.replace(ROUND, str(number)), is_control=True)
        yield from head
        prefix = self.user.prefix
        for part in join_texts(arrange_images(turn.parts, self.image_order)):
            if part == IMAGE:
                yield from (Piece(prefix), IMAGE)
                prefix = ""
            elif not self.only_images_of_user:
                yield Piece(prefix + str(part))
                prefix = ""
        yield Piece(self.user.after, is_control=True)


def _im(role: str) -> RoleFormat:
    return RoleFormat(f"<|im_start|>{role}\n", "<|im_end|>\n")


def _llama3(role: str) -> RoleFormat:
    return RoleFormat(f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")


def _of_family(name: str, values: dict[str, Any]) -> ChatTemplate:
    roles: dict[str, Any] = {
        role: RoleFormat(*values[role]) for role in ("user", "assistant", "system") if role in values
    }
    return ChatTemplate(name, **{**values, **roles})


_CHATML_REPLY = RoleFormat("<|im_start|>assistant\n", "<|im_end|>")

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("plain", user=RoleFormat(), assistant=RoleFormat(after=EOS), only_images_of_user=True),
        ChatTemplate("chatml", _im("user"), _CHATML_REPLY, _im("system"), separator="\n", bos="never"),
        ChatTemplate("internlm2", _im("user"), _CHATML_REPLY, _im("system"), separator="\n", bos="always"),
        ChatTemplate(
            "llama2",
            user=RoleFormat("[INST] ", " [/INST]"),
            assistant=RoleFormat(prefix=" ", after=f" {EOS}"),
            system=RoleFormat("<<SYS>>\n", "\n<</SYS>>\n\n"),
            separator=BOS,
            bos="always",
            system_in_first_user=True,
        ),
        ChatTemplate("llama3", _llama3("user"), _llama3("assistant"), _llama3("system"), bos="always"),
        ChatTemplate(
            "vicuna",
            user=RoleFormat("USER:", " ", prefix=" "),
            assistant=RoleFormat("ASSISTANT:", EOS, prefix=" "),
            system=RoleFormat(after=" "),
            default_system=(
                "A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's questions."
            ),
        ),
        ChatTemplate(
            "alpaca",
            user=RoleFormat("### Instruction:\n", "\n\n"),
            assistant=RoleFormat("### Response:\n", EOS),
            system=RoleFormat(after="\n\n"),
            separator="\n\n",
            default_system=(
                "Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request."
            ),
        ),
        *(_of_family(name, values) for name, values in FAMILY_TEMPLATES.items()),
    )
}


# as exports write them: their tokenizers leave the begin token to the template
_WITH_BEGIN = [replace(template, bos="always") for template in TEMPLATES.values() if template.bos == "tokenizer"]
NO_CHAT_TEMPLATE = "data.template is tokenizer, but this tokenizer has no chat template. Name one of: " + ", ".join(
    TEMPLATES
)


def match_tokenizer_template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The template of ours that writes what the tokenizer's own chat template writes, default system prompt included.

    Raises:
        ConfigError: the tokenizer has no chat template, or none of ours writes the same.
    """
    if not tokenizer.chat_template:
        raise ConfigError(NO_CHAT_TEMPLATE)
    spoken: tuple[tuple[Role, str], ...] = (("user", "Hi"), ("assistant", "Yes?"), ("user", "Go"))
    asked = [{"role": role, "content": text} for role, text in spoken]
    turns = tuple(Turn(role, (text,)) for role, text in spoken)
    try:
        expected = [
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            for messages in (asked, [{"role": "system", "content": "Be brief."}, *asked])
        ]
    except jinja2.TemplateError as error:  # some refuse system turns
        raise ConfigError(
            f"data.template is tokenizer, but its chat template refuses a plain conversation with a system turn "
            f"({error}). Name one of: {', '.join(TEMPLATES)}"
        ) from None
    nearest, agreement = "", -1
    for template in (*TEMPLATES.values(), *_WITH_BEGIN):
        candidate = _with_system_of(template, tokenizer, turns, expected[0])
        rendered = [render_text(candidate, tokenizer, turns, system) for system in (None, "Be brief.")]
        if rendered == expected:
            return candidate
        pairs = zip(rendered[0], expected[0], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common > agreement:
            nearest, agreement = f"{candidate.name} writes {rendered[0]!r}", common
    raise ConfigError(
        f"data.template is tokenizer, but none of ours writes what its chat template writes: {expected[0]!r}. "
        f"Nearest: {nearest}. Name one of {', '.join(TEMPLATES)}, or add the family in vlm/data/template.py"
    )


def render_text(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...], system: str | None
) -> str:
    """A text-only conversation as one string, ending with the generation prompt."""
    pieces = template.render(Conversation(turns), system=system, add_generation_prompt=True)
    text = "".join(piece.text if isinstance(piece, Piece) else "<image>" for piece in pieces)
    with_bos = template.bos == "always" or adds_bos(tokenizer)
    return text.replace(BOS, (tokenizer.bos_token or "") * with_bos).replace(EOS, tokenizer.eos_token or "")


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Does the tokenizer put its begin token in front by itself?"""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def check_template(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> str:
    """A warning naming the template's control words that are several tokens here, or an empty string.

    The words then are learned as text, which trains, but usually means that the template is of another family.
    """
    words = control_words(template)
    return warn_of_split(template, [w for w in words if len(tokenizer(w, add_special_tokens=False).input_ids) != 1])


def control_words(template: ChatTemplate) -> list[str]:
    """Words of a template that are single tokens of the model family it is of.

    >>> control_words(TEMPLATES["chatml"]), control_words(TEMPLATES["llama2"])
    (['<|im_start|>', '<|im_end|>'], [])
    """
    if template.tokens is not None:
        return list(template.tokens)
    formats = (template.system, template.user, template.assistant)
    control = "".join(text for form in formats for text in (form.before, form.after))
    return list(dict.fromkeys(_CONTROL_WORD.findall(control)))


def warn_of_split(template: ChatTemplate, split: list[str]) -> str:
    """A warning naming control words that are several tokens, or an empty string."""
    if not split:
        return ""
    return (
        f"data.template {template.name}: {', '.join(split)} {'is' if len(split) == 1 else 'are'} no single token of "
        "this tokenizer. Usually the template belongs to another model family"
    )


def why_no_end(template: ChatTemplate, has_eos: bool, is_token: Callable[[str], bool]) -> str | None:
    """Why replies under a template would have no end that can be learned.

    Args:
        has_eos: the tokenizer has an end token of its own.
        is_token: whether a word is a single token of it.
    """
    if EOS in template.stop:
        return None if has_eos else f"template {template.name} ends replies with the tokenizer's end token; it has none"
    control = template.stop.strip()
    if is_token(control):
        return None
    return (
        f"template {template.name} ends replies with {control}, which is no token of this tokenizer. Choose the "
        "template of this model's family with data.template"
    )


def _with_system_of(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...], rendered: str
) -> ChatTemplate:
    """The template with the default system prompt that `rendered` shows, or with none."""
    plain = replace(template, default_system=None)
    if render_text(plain, tokenizer, turns, None) == rendered:
        return plain
    before, mark, after = render_text(plain, tokenizer, turns, "\0").partition("\0")
    fits = mark and rendered.startswith(before) and rendered.removeprefix(before).endswith(after)
    return replace(plain, default_system=rendered.removeprefix(before).removesuffix(after)) if fits else plain


# Lists of parts as text; `arrange_images` and `vlm.inference.messages` do the same. Servers of other projects hand over
# images and words as they came.
_IMAGES = "{%- for part in content -%}{%- if part['type'] == 'image' -%}<image>{%- endif -%}{%- endfor -%}"
_FLAT: dict[ImageOrder, str] = {
    "keep": (
        "{%- for part in content -%}"
        "{%- if part['type'] == 'image' -%}<image>"
        "{%- elif part['type'] == 'text' and not images_only -%}"
        "{%- if loop.previtem is defined and loop.previtem['type'] == 'image' and part['text'][:1] != '\\n' -%}"
        "{{ '\\n' }}{%- endif -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "first": (
        "{%- set seen = namespace(gap=false) -%}"
        "{%- for part in content -%}"
        "{%- if part['type'] == 'image' -%}<image>{%- set seen.gap = true -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- for part in content -%}"
        "{%- if part['type'] == 'image' -%}{%- set seen.gap = true -%}"
        "{%- elif part['type'] == 'text' and part['text'] and not images_only -%}"
        "{%- if seen.gap and part['text'][:1] != '\\n' -%}{{ '\\n' }}{%- endif -%}"
        "{{ part['text'] }}{%- set seen.gap = false -%}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "last": (
        "{%- set seen = namespace(image=false, gap=false, text='') -%}"
        "{%- for part in content -%}"
        "{%- if part['type'] == 'image' -%}{%- set seen.image = true -%}{%- set seen.gap = seen.text != '' -%}"
        "{%- elif part['type'] == 'text' and part['text'] and not images_only -%}"
        "{%- if seen.gap and part['text'][:1] != '\\n' -%}{{ '\\n' }}{%- endif -%}"
        "{%- if seen.image and seen.text == '' and part['text'] | length > 1 and part['text'][:1] == '\\n' -%}"
        "{{ part['text'][1:] }}"
        "{%- else -%}{{ part['text'] }}{%- endif -%}"
        "{%- set seen.text = part['text'] -%}{%- set seen.gap = false -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if seen.image and seen.text != '' and seen.text[-1:] != '\\n' -%}{{ '\\n' }}{%- endif -%}"
    )
    + _IMAGES,
}


_COUNT = "ns.round"


def _jinja(template: ChatTemplate, start: str, bos_token: str, eos_token: str) -> str:
    def text(value: str) -> str:
        return json.dumps(value.replace(BOS, bos_token).replace(EOS, eos_token), ensure_ascii=False)

    user, assistant, system = template.user, template.assistant, template.system
    counts = ROUND in user.before
    opening = f" ~ {_COUNT} ~ ".join(text(part) for part in user.before.split(ROUND))
    default = "none" if template.default_system is None else text(template.default_system)
    head = f"{text(system.before + system.prefix)} + ns.system + {text(system.after)}"
    inside = template.system_in_first_user
    lines = [
        "{%- macro flat(content, images_only) -%}",
        "{%- if content is string -%}{%- if not images_only -%}{{ content }}{%- endif -%}",
        f"{{%- else -%}}{_FLAT[template.image_order]}{{%- endif -%}}{{%- endmacro -%}}",
        f"{{%- set ns = namespace(system={default}, head=''{', round=0' if counts else ''}) -%}}",
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set ns.system = flat(messages[0]['content'], false) -%}{%- endif -%}",
        f"{{{{- {text(start + template.start)} -}}}}",
    ]
    if not template.only_images_of_user:
        lines.append(f"{{%- if ns.system is not none -%}}{{%- set ns.head = {head} -%}}{{%- endif -%}}")
    if not inside:
        lines.append("{{- ns.head -}}")
    first = "ns.head + " if inside else ""
    images_only = str(template.only_images_of_user).lower()
    lines += [
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'user' -%}",
        f"{{%- set {_COUNT} = {_COUNT} + 1 -%}}" if counts else "",
        f"{{{{- {opening} + {first}{text(user.prefix)} + flat(message['content'], {images_only})"
        f" + {text(user.after)} -}}}}",
        "{%- set ns.head = '' -%}",
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- {text(assistant.before)} -}}}}",
        f"{{%- generation -%}}{{{{- {text(assistant.prefix)} + flat(message['content'], false)"
        f" + {text(assistant.after)} -}}}}{{%- endgeneration -%}}",
        f"{{{{- {text(template.separator)} -}}}}",
        *_later_system(template, text),
        "{%- elif not (message['role'] == 'system' and loop.first) -%}",
        f"{{{{- raise_exception('the chat template {template.name} cannot write a turn of role ' ~ message['role']"
        " ~ ' here') -}}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {text(assistant.before)} -}}}}{{%- endif -%}}",
    ]
    return "".join(lines)


def _later_system(template: ChatTemplate, text: Callable[[str], str]) -> list[str]:
    """The loop's branch for a system turn that is not the first; none where that cannot be written."""
    if not template._can_repeat_system:
        return []
    before, after = text(template.system.before + template.system.prefix), text(template.system.after)
    return [
        "{%- elif message['role'] == 'system' and not loop.first -%}",
        f"{{{{- {before} + flat(message['content'], false) + {after} -}}}}",
    ]
