"""The terminal: every command with lines from a list."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_export import model_config, write_image, write_llm, write_run

from vlm.apps.session import ChatSession
from vlm.apps.terminal.app import Terminal, run_terminal
from vlm.apps.terminal.commands import COMMANDS
from vlm.apps.terminal.screen import Screen, printable
from vlm.apps.terminal.talk import Talk
from vlm.cli.main import main
from vlm.errors import ConfigError
from vlm.export.run import export_run
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import LoadedModel, load

Converse = Callable[..., tuple[str, Talk]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("terminal")
    write_llm(root / "llm", max_positions=100_000)
    write_run(root / "run", model_config(root))
    export_run(root / "run")
    write_image(root / "cat.png")
    write_image(root / "my dog.png", seed=2)
    (root / "page.png").write_text("<html>")
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedModel:
    return load(root / "run" / "export", device="cpu", precision="fp32")


@pytest.fixture
def converse(loaded: LoadedModel) -> Converse:
    def converse(*lines: str | type[BaseException]) -> tuple[str, Talk]:
        left: Iterator[str | type[BaseException]] = iter((*lines, EOFError))

        def read(prompt: str, asks_for_image: bool) -> str:
            line = next(left)
            if isinstance(line, str):
                return line
            raise line

        screen = Screen(io.StringIO())
        talk = Talk(ChatSession(loaded), GenerationSettings(max_new_tokens=4), screen)
        Terminal(talk, read).run()
        assert isinstance(screen.out, io.StringIO)
        return screen.out.getvalue(), talk

    return converse


def questions(talk: Talk) -> list[str]:
    return [exchange.question for exchange in talk.session.exchanges]


def names(talk: Talk) -> list[str]:
    return [Path(str(image)).name for image in talk.session.images]


@pytest.mark.slow
def test_it_asks_for_an_image_and_none_is_fine(converse: Converse, root: Path):
    assert converse("", "Hello")[1].session.images == []
    text, talk = converse(str(root / "missing.png"), str(root / "cat.png"), ":f", "What?")
    assert "missing.png does not exist" in text
    assert (names(talk), questions(talk)) == (["cat.png"], ["What?"])


def test_several_images_are_ended_by_f(converse: Converse, root: Path):
    _, talk = converse(str(root / "cat.png"), f"'{root / 'my dog.png'}'", ":f", "Compare them")
    assert len(talk.session.exchanges[0].images) == 2


@pytest.mark.parametrize("line", ["{root}/cat.png '{root}/my dog.png'", "{root}/cat.png {root}/my\\ dog.png"])
def test_several_images_in_one_line(converse: Converse, root: Path, line: str):
    assert names(converse(line.format(root=root), ":f")[1]) == ["cat.png", "my dog.png"]


def test_a_question_typed_where_an_image_is_asked_for_is_a_question(converse: Converse, root: Path):
    assert questions(converse("Hello", "Second")[1]) == ["Hello", "Second"]
    _, talk = converse(str(root / "cat.png"), "这是什么？")
    assert (names(talk), questions(talk)) == (["cat.png"], ["这是什么？"])


def test_commands_work_where_an_image_is_asked_for(converse: Converse):
    text, talk = converse(":help", "/exit", "never asked")
    assert ":exit :quit :q" in text
    assert questions(talk) == []


def test_a_file_that_is_no_image_is_said_and_not_kept(converse: Converse, root: Path):
    text, talk = converse(str(root / "page.png"), "", f":img {root / 'page.png'}", f":img + {root / 'page.png'}")
    assert text.count("page.png is an HTML page") == 3
    assert names(talk) == []


def test_the_reply_is_written_behind_its_mark(converse: Converse):
    text, talk = converse("", "Hello")
    assert f"model> {talk.session.history[0][1]}" in text


@pytest.mark.parametrize("leave", [":exit", ":quit", ":q", "/exit", "/q", "：q", "exit", "EXIT", EOFError])
def test_every_way_to_leave(converse: Converse, leave: str | type[BaseException]):
    assert questions(converse("", leave, "never asked")[1]) == []
    assert questions(converse(leave, "never asked")[1]) == []


@pytest.mark.parametrize("command", [":clh", ":clear-his", "/clear_his", "：CLH", "clear", "RESET"])
def test_clh_forgets_the_conversation_and_keeps_the_image(converse: Converse, root: Path, command: str):
    text, talk = converse(str(root / "cat.png"), "", "What?", command, "/img")
    assert questions(talk) == []
    assert names(talk) == ["cat.png"]
    assert text.rstrip().endswith("cat.png")


def test_img_shows_replaces_adds_and_takes_away(converse: Converse, root: Path):
    cat, dog = root / "cat.png", root / "my dog.png"
    text, talk = converse("", ":img", f":img {dog}", ":img")
    assert "No image." in text
    assert names(talk) == ["my dog.png"]
    _, talk = converse(str(cat), "", "What?", f":img {dog}")
    assert (names(talk), questions(talk)) == (["my dog.png"], [])
    _, talk = converse(str(cat), "", "What?", f":img + {dog}", "And this?")
    assert (names(talk), questions(talk)) == (["cat.png", "my dog.png"], ["What?", "And this?"])
    assert [len(exchange.images) for exchange in talk.session.exchanges] == [1, 1]
    _, talk = converse(str(cat), "", "What?", ":img -")
    assert (names(talk), questions(talk)) == ([], [])


def test_an_image_that_cannot_be_read_changes_nothing(converse: Converse, root: Path):
    text, talk = converse(str(root / "cat.png"), "", "What?", ":img nothing.png", ":img https://a.example/b.png")
    assert "nothing.png does not exist" in text
    assert "nothing is fetched" in text
    assert (names(talk), questions(talk)) == (["cat.png"], ["What?"])


def test_history_undo_and_retry(converse: Converse):
    text, talk = converse("", ":his", ":undo", ":retry", "Hello", "Second", ":undo", ":retry", ":history")
    assert "Nothing was said yet." in text
    assert "Nothing to undo." in text
    assert "no question to ask again" in text
    assert "Taken back: Second" in text
    assert questions(talk) == ["Hello"]
    assert f"user> Hello\nmodel> {talk.session.history[0][1]}" in text


def test_conf_shows_and_changes_settings_and_reset_brings_the_first_ones_back(converse: Converse):
    text, talk = converse("", ":conf")
    assert "max_new_tokens = 4 " in text
    assert "采样温度" in text
    _, talk = converse("", ":conf do_sample=true temperature=0.5 top-k=7 seed=3")
    assert talk.settings == GenerationSettings(max_new_tokens=4, do_sample=True, temperature=0.5, top_k=7, seed=3)
    assert converse("", ":conf max_new_tokens 9")[1].settings.max_new_tokens == 9
    assert converse("", ":conf num_beams=3", "/reset_conf")[1].settings == GenerationSettings(max_new_tokens=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tempreature=1", "did you mean temperature?"),
        ("temperature=0", "temperature > 0"),
        ("temperature=nan", "temperature > 0"),
        ("top_p=2", "0 < top_p <= 1"),
        ("top_k=-1", "top_k >= 0"),
        ("top_k=1.5", "expected a whole number"),
        ("do_sample=maybe", "expected true or false"),
        ("max_new_tokens=0", "at least 1"),
        ("repetition_penalty=-1", "expected a number over 0"),
        ("length_penalty=nan", "expected a number; 1 is"),
        ("max_length=0", "max_length 0: expected"),
        ("seed=99999999999999999999", "below 2^63"),
        ("num_beams=4 seed=x", "expected a whole number, or -"),
    ],
)
def test_a_wrong_setting_is_said_and_changes_nothing(converse: Converse, change: str, message: str):
    text, talk = converse("", f":conf {change}")
    assert message in text
    assert talk.settings == GenerationSettings(max_new_tokens=4)


def test_a_setting_of_sampling_without_sampling_says_that_it_does_nothing(converse: Converse):
    assert "temperature count only with :conf do_sample=true" in converse("", ":conf temperature=0.7")[0]
    assert "count only" not in converse("", ":conf do_sample=on temperature=0.7")[0]
    assert "length_penalty count only with :conf num_beams=4" in converse("", ":conf length_penalty 0.5")[0]


def test_seed_is_shown_set_and_unset(converse: Converse):
    text, talk = converse("", ":seed", ":seed 5", ":seed")
    assert "seed = - " in text
    assert talk.settings.seed == 5
    assert converse("", ":seed 5", ":seed -")[1].settings.seed is None


def test_the_same_seed_gives_the_same_sampled_reply(converse: Converse):
    lines = ("", ":conf do_sample=true temperature=3 max_new_tokens=12", ":seed 7", "Hello")
    assert converse(*lines)[1].session.history == converse(*lines)[1].session.history


def test_system_is_shown_set_and_taken_back(converse: Converse):
    text, talk = converse("", ":system", ":system You are {bot_name}.", ":system", "Hello")
    assert "No system prompt." in text
    assert "You are model." in text
    assert talk.session.conversation("").turns[0].text == "You are model."
    assert converse("", ":system Brief.", ":system -")[1].session.system is None


@pytest.mark.parametrize(
    ("typed", "meant"), [(":hlep", ":help"), ("/histroy", ":history"), (":imgg", ":img"), (":resetconf", ":reset-conf")]
)
def test_a_typo_gets_the_nearest_command(converse: Converse, typed: str, meant: str):
    text, talk = converse("", typed)
    assert f"Did you mean {meant}?" in text
    assert questions(talk) == []


def test_a_path_typed_as_a_question_says_how_to_show_it(converse: Converse, root: Path):
    assert f"To show that image: :img {root / 'cat.png'}" in converse("", str(root / "cat.png"))[0]


def test_words_that_are_commands_are_questions_after_a_blank_or_in_another_case(converse: Converse):
    assert questions(converse("", " exit", "Clear", "reset", "EXIT")[1]) == ["exit", "Clear", "reset"]


def test_a_question_may_begin_like_a_command_after_a_blank(converse: Converse):
    assert questions(converse("", " :) what is this?")[1]) == [":) what is this?"]


def test_help_lists_every_command_in_both_languages(converse: Converse):
    text, _ = converse("", "/h")
    for command in COMMANDS:
        for argument, english, chinese in command.uses:
            line = next(line for line in text.splitlines() if english in line)
            assert all(f":{name}" in line for name in command.names)
            assert argument in line
            assert chinese in line


def test_an_argument_too_many_is_said(converse: Converse):
    assert ":undo takes nothing behind it" in converse("", "Hello", ":undo 2")[0]


def test_clear_writes_no_control_codes_into_a_file(converse: Converse):
    assert "\033" not in converse("", ":clear", ":cl")[0]


def test_ctrl_c_at_the_prompt_drops_the_line_and_stays(converse: Converse):
    assert questions(converse("", KeyboardInterrupt, "Hello")[1]) == ["Hello"]


def test_an_over_long_question_says_so_and_the_chat_goes_on(
    converse: Converse, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loaded.model.llm.config, "max_position_embeddings", 64)
    text, talk = converse("", "one two three " * 50, "Hello")
    assert "the model reads at most 64" in text
    assert questions(talk) == ["Hello"]


def test_a_question_without_an_image_under_a_template_of_images_alone_is_refused(root: Path):
    loaded = load(root / "run" / "export", device="cpu", precision="fp32", template="plain")
    with pytest.raises(ConfigError, match="no tokens: template plain writes images only"):
        next(ChatSession(loaded).ask("Hello"))


def test_out_of_memory_is_said_and_the_chat_goes_on(converse: Converse, monkeypatch: pytest.MonkeyPatch):
    def generate(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")

    with monkeypatch.context() as patch:
        patch.setattr("vlm.inference.load.generate", generate)
        text, talk = converse("", "Hello", ":his")
    assert "can't allocate memory\nThe conversation is as it was" in text
    assert questions(talk) == []


def test_control_codes_in_a_reply_never_reach_the_terminal(converse: Converse, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "vlm.data.tokenize.ConversationTokenizer.decode", lambda self, ids: "a\x1b]0;title\x07b" * len(ids)
    )
    text, _ = converse("", "Hello")
    assert "model> a]0;titleb" in text
    assert "\x1b" not in text


def test_one_shot_prints_the_reply_alone(root: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]):
    settings = GenerationSettings(max_new_tokens=6)
    for streams in (True, False):
        run_terminal(lambda: loaded, [root / "cat.png"], "What is this?", settings=settings, streams=streams)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second != ""
    assert "model>" not in first


def test_stop_words_end_a_reply(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]):
    settings = GenerationSettings(max_new_tokens=12)
    whole = loaded.chat("Hello", max_new_tokens=12)
    stop = next(pair for pair in map("".join, pairwise(whole[2:])) if pair.isalpha() and pair.isascii())
    run_terminal(lambda: loaded, prompt="Hello", settings=settings, stop_words=["never", stop])
    assert capsys.readouterr().out.strip() == printable(whole[: whole.index(stop)]).strip()


def test_an_image_is_looked_at_before_the_model_is_loaded(root: Path):
    from vlm.errors import RecordError

    with pytest.raises(RecordError, match=r"page\.png"):
        run_terminal(lambda: pytest.fail("loaded"), [root / "page.png"], "What?")


def test_wrong_flags_end_before_a_model_is_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(root)
    monkeypatch.setattr("vlm.inference.load.assemble_export", lambda *_, **__: pytest.fail("weights are read"))
    for flags, message in (
        (["--bits", "3"], "--bits 3: bitsandbytes stores weights in 4 or 8 bits"),
        (["--prompt_template", "chatmll"], "did you mean chatml?"),
        (["--image", "page.png"], "is an HTML page"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["chat", str(root / "run" / "export"), "--prompt", "Hi", *flags])
        out, err = capsys.readouterr()
        assert message in err
        assert "Traceback" not in err
        assert (out, end.value.code in (2, 3)) == ("", True)
