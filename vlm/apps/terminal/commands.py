"""The commands of the terminal chat: one table, from which help, completion and did-you-mean are made."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm.apps.saving import save_record
from vlm.apps.terminal import settings as terminal_settings
from vlm.apps.terminal.images import image_paths, is_file
from vlm.apps.terminal.input import image_completer
from vlm.apps.terminal.talk import Talk
from vlm.errors import VLMError

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

MARKS = ":/：／"  # the wide ones are what a Chinese keyboard types
FOOT = (
    "A command may begin with / as well; a question that begins so, or is one of the words without a mark, is typed\n"
    "after a blank. Ctrl-C stops an answer.\n"
    "命令也可以用 / 开头；以 : 或 / 开头、或与上面不带符号的单词相同的问题，前面请加一个空格。按 Ctrl-C 中止回答。"
)


@dataclass(frozen=True)
class Command:
    names: tuple[str, ...]  # the first is its own, the others are short for it
    run: Callable[[Talk, str], None]
    uses: tuple[tuple[str, str, str], ...]  # argument, what it does in English, in Chinese
    words: tuple[str, ...] = ()  # what other programs call it: a line of just that word
    completes: str = ""  # what its argument is: "image", "file" or "setting"

    @property
    def takes_argument(self) -> bool:
        return any(argument for argument, _, _ in self.uses)

    def rows(self) -> Iterator[list[str]]:
        """Of the help."""
        names = " ".join([*(f":{name}" for name in self.names), *self.words])
        for argument, english, chinese in self.uses:
            yield [f"{names} {argument}".rstrip(), english, chinese]


class Leave(Exception):
    """The user wants to go."""


def run_command(talk: Talk, line: str) -> None:
    """A line that begins with one of `MARKS`.

    Raises:
        Leave: it says so.
    """
    name, _, argument = line[1:].strip().partition(" ")
    command = BY_NAME.get(name.lower())
    if command is None:
        talk.complain(_no_such(line, name))
        return
    if argument.strip() and not command.takes_argument:
        talk.complain(f":{name} takes nothing behind it.  :{name} 后面不带参数。")
        return
    try:
        command.run(talk, argument.strip())
    except VLMError as error:
        talk.complain(str(error))


def is_command(line: str) -> bool:
    """Whether a line begins with a command that there is."""
    return line[0] in MARKS and line[1:].split(" ")[0].lower() in BY_NAME


def _announce(talk: Talk, paths: list[str]) -> None:
    for path in paths:
        talk.note(f"Image  图片: {path}")
        talk.screen.show_image(path)


def _no_such(line: str, name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), _NAMES, 1, cutoff=0.5)
    hint = f"Did you mean :{near[0]}?  是不是 :{near[0]}？" if near else "See :help.  参见 :help。"
    if line[0] == "/" and all(is_file(path) for path in image_paths(line)):
        hint = f"To show that image: :img {line}  要显示这张图片，请输入 :img {line}"
    return f"No command {line[0]}{name}. {hint}"


def _help(talk: Talk, _: str) -> None:
    talk.screen.table([row for command in COMMANDS for row in command.rows()])
    talk.screen.say(FOOT)


def _clear_screen(talk: Talk, _: str) -> None:
    talk.screen.clear()


def _forget(talk: Talk, _: str) -> None:
    talk.session.clear(keep_images=True)
    talk.note("History cleared, images kept.  已清除历史，图片保留。")


def _show_history(talk: Talk, _: str) -> None:
    if not talk.session.exchanges:
        talk.note("Nothing was said yet.  还没有对话。")
    for exchange in talk.session.exchanges:
        shown = "".join(f"[{_name_of(image)}] " for image in exchange.images)
        talk.screen.say(f"user> {shown}{exchange.question}\n{talk.bot_name}> {exchange.reply}")


def _images(talk: Talk, argument: str) -> None:
    if not argument:
        _show_images(talk)
    elif argument.startswith("+"):
        paths = image_paths(argument[1:])
        talk.session.add_images(paths)
        _announce(talk, paths)
    else:
        had_history = bool(talk.session.exchanges)
        paths = [] if argument == "-" else image_paths(argument)
        talk.session.set_images(paths)
        _announce(talk, paths)
        if had_history or not paths:
            talk.note(f"{'A' if paths else 'No image, a'} new conversation.  开始新的对话。")


def _show_images(talk: Talk) -> None:
    if not talk.session.images:
        talk.note("No image.  没有图片。")
    for image in talk.session.images:
        talk.screen.say(_name_of(image))
        talk.screen.show_image(image)


def _seed(talk: Talk, argument: str) -> None:
    _settings(talk, f"seed={argument}" if argument else "seed")


def _settings(talk: Talk, argument: str) -> None:
    talk.settings, names = terminal_settings.change(talk.settings, argument)
    talk.screen.table(terminal_settings.rows(talk.settings, names))
    if "=" not in argument and " " not in argument:
        return
    for switch, idle in terminal_settings.without_effect(talk.settings, names).items():
        change = {"do_sample": ":conf do_sample=true", "num_beams": ":conf num_beams=4"}[switch]
        talk.note(f"{', '.join(idle)} count only with {change}.  需要先 {change} 才会生效。")


def _reset_settings(talk: Talk, _: str) -> None:
    talk.settings = talk.first_settings
    _settings(talk, "")


def _system(talk: Talk, argument: str) -> None:
    if argument:
        talk.set_system(None if argument == "-" else argument)
    text = talk.session.system_in_use
    talk.screen.say("No system prompt.  没有系统提示。" if text is None else f"System prompt  系统提示: {text}")


def _retry(talk: Talk, _: str) -> None:
    talk.retry()


def _undo(talk: Talk, _: str) -> None:
    question = talk.session.undo()
    talk.note("Nothing to undo.  没有可撤回的问题。" if question is None else f"Taken back: {question}  已撤回。")


def _save(talk: Talk, argument: str) -> None:
    if not argument:
        talk.complain("Name a file: :save talks.jsonl  请给出文件名，例如 :save talks.jsonl")
        return
    file = save_record(talk.session, argument.strip("'\""))
    talk.note(f"Saved as a training record: {file}  已保存为训练数据：{file}")


def _leave(talk: Talk, _: str) -> None:
    raise Leave


def _name_of(image: str | bytes) -> str:
    return image if isinstance(image, str) else "an image in memory  内存中的图片"


COMMANDS = (
    Command(("help", "h"), _help, (("", "this list", "显示本帮助"),)),
    Command(
        ("img",),
        _images,
        (
            ("", "the images of the conversation", "显示当前的图片"),
            ("PATH ...", "these instead; a new conversation", "换成这些图片，开始新的对话"),
            ("+ PATH ...", "more of them, for the next question", "为下一个问题再加图片"),
            ("-", "none; a new conversation", "去掉图片，开始新的对话"),
        ),
        completes="image",
    ),
    Command(("his", "history"), _show_history, (("", "the conversation so far", "显示对话历史"),)),
    Command(
        ("clh", "clear-his"),
        _forget,
        (("", "forget it, keep the images", "清除对话历史，保留图片"),),
        ("clear", "RESET"),
    ),
    Command(("undo",), _undo, (("", "take the last question back", "撤回上一个问题"),)),
    Command(("retry",), _retry, (("", "answer the last question again", "重新回答上一个问题"),)),
    Command(("system",), _system, (("[TEXT]", "system prompt; - for the export's", "查看或设置系统提示，- 恢复默认"),)),
    Command(
        ("conf",), _settings, (("[NAME=VALUE]", "how answers are chosen", "查看或修改生成参数"),), completes="setting"
    ),
    Command(("reset-conf",), _reset_settings, (("", "as at the start", "恢复启动时的生成参数"),)),
    Command(("seed",), _seed, (("[N]", "of sampling; - for none", "查看或设置随机种子，- 表示不固定"),)),
    Command(
        ("save",), _save, (("FILE", "add the conversation to training data", "把对话存为训练数据"),), completes="file"
    ),
    Command(("clear", "cl"), _clear_screen, (("", "clear the screen", "清屏"),)),
    Command(("exit", "quit", "q"), _leave, (("", "leave (also Ctrl-D)", "退出（也可按 Ctrl-D）"),), ("exit", "EXIT")),
)
_NAMES = [name for command in COMMANDS for name in command.names]
BY_NAME = {name: command for command in COMMANDS for name in command.names}
BY_WORD = {word: f":{command.names[0]}" for command in COMMANDS for word in command.words}
BY_NAME |= {name.replace("-", "_"): command for name, command in BY_NAME.items()}


def completer() -> Completer:
    """Completes commands, and behind them images, files and settings."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = {"image": image_completer(), "file": PathCompleter(expanduser=True)}

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            line = document.text_before_cursor
            if not line or line[0] not in MARKS:
                return
            name, blank, argument = line[1:].partition(" ")
            if not blank:
                yield from (Completion(other, -len(name)) for other in _NAMES if other.startswith(name))
                return
            kind = BY_NAME[name].completes if name in BY_NAME else ""
            if kind == "setting":
                word = argument.rpartition(" ")[2]
                names_left = (setting for setting in terminal_settings.MEANINGS if setting.startswith(word))
                yield from (Completion(f"{setting}=", -len(word)) for setting in names_left)
            elif kind:
                argument = argument.lstrip("+ ")
                yield from paths[kind].get_completions(Document(argument, len(argument)), complete_event)

    return Commands()
