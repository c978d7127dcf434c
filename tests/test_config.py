"""From YAML to a typed config: inheritance, overrides, and what is said when something is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vlm.config import find_config, json_schema, load_config, resolve_for_log, shipped_projects
from vlm.data.config import TemplateName
from vlm.errors import ConfigError
from vlm.layered_yaml import Loader, read_layers

GOOD = """\
output_dir: run
model: {llm: {path: some/llm}, vision: {backend: hf, path: some/clip}}
data: {sources: [{path: a.json}]}
train: {epochs: 1}
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "a.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def problems(path: str, *options: str) -> list[str]:
    """The lines of the error, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


# inheritance and overrides


def test_a_file_overrides_its_bases_and_options_override_the_file():
    write("seed: 1\ntrain: {learning_rate: 1e-3, max_grad_norm: 0.5}\n", "base/first.yaml")
    write("base: first.yaml\nseed: 2\ntrain: {weight_decay: 0.1}\n", "base/second.yaml")
    path = write(f"base: base/second.yaml\n{GOOD.replace('epochs: 1', 'epochs: 1, learning_rate: 2e-5')}")
    config = load_config(path, ["train.weight_decay=0.2"])
    train = config.train
    assert (config.seed, train.learning_rate, train.max_grad_norm, train.weight_decay) == (2, 2e-5, 0.5, 0.2)


def test_of_several_bases_the_later_one_wins():
    write("seed: 1\n", "x.yaml")
    write("seed: 2\n", "y.yaml")
    assert load_config(write(f"base: [x.yaml, y.yaml]\n{GOOD}")).seed == 2


def test_lists_are_replaced_not_joined():
    write(GOOD.replace("[{path: a.json}]", "[{path: a.json}, {path: b.json}]"), "x.yaml")
    config = load_config(write("base: x.yaml\ndata: {sources: [{path: c.json}]}"))
    assert [source.path for source in config.data.sources] == ["c.json"]


@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("train.learning_rate=1e-4", lambda c: c.train.learning_rate == 1e-4),
        ("train.betas=[0.9, 0.95]", lambda c: c.train.betas == (0.9, 0.95)),
        ("data.sources.0.path=b.json", lambda c: c.data.sources[0].path == "b.json"),
        ("data.sources[0].weight=2", lambda c: c.data.sources[0].weight == 2),
        ("train.learning_rates[llm.lora]=1e-5", lambda c: c.train.learning_rates == {"llm.lora": 1e-5}),
        ("model.vision=null", lambda c: c.model.vision is None),
        ("train.warmup_ratio=", lambda c: c.train.warmup_ratio is None),
        ("data.system=a=b", lambda c: c.data.system == "a=b"),
        ("output_dir=runs/${train.epochs}", lambda c: c.output_dir == "runs/1"),
    ],
)
def test_option(option, read):
    more = ["model.trainable=[llm]"] if "vision=null" in option else []
    assert read(load_config(write(GOOD), [option, *more]))


def test_interpolation_sees_overrides_because_it_is_resolved_last():
    path = write(GOOD.replace("output_dir: run", "name: cat\nseed: 0\noutput_dir: runs/${name}/${seed}"))
    assert load_config(path).output_dir == "runs/cat/0"
    assert load_config(path, ["name=dog", "seed=3"]).output_dir == "runs/dog/3"


def test_the_config_is_frozen():
    config = load_config(write(GOOD))
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 2


# everything that is wrong, at once, with its place


def test_all_problems_of_all_files_are_reported_at_once_where_they_were_written():
    write("train:\n  epochs: 1\n  learning_rat: 1e-3\n", "base/train.yaml")
    path = write(
        "base: base/train.yaml\n"
        "output_dir: run\n"
        "model:\n"
        "  llm: {path: some/llm}\n"
        "  vision: {backend: hff, path: some/clip}\n"
        "data:\n"
        "  template: chatmll\n"
        "  max_length: 0\n"
        "  sources:\n"
        "    - {pth: a.json}\n"
    )
    assert problems(path, "engine.devise=cpu") == [
        "a.yaml:5: model.vision.backend: expected 'hf', 'open_clip' or 'timm'; did you mean 'hf'? (found 'hff')",
        f"a.yaml:7: data.template: expected {', '.join(map(repr, get_args(TemplateName)[:-1]))} or 'tokenizer'; "
        "did you mean 'chatml'? (found 'chatmll')",
        "a.yaml:10: data.sources[0].path: missing, and it has no default",
        "a.yaml:10: data.sources[0].pth: unknown key; did you mean path?",
        "a.yaml:8: data.max_length: expected more than 0 (found 0)",
        "base/train.yaml:3: train.learning_rat: unknown key; did you mean learning_rate?",
        "--options: engine.devise: unknown key; did you mean device?",
    ]


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("learning_rate=1", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("trian.epochs=1", "trian: unknown key; did you mean train?"),
        (
            "engine.zebra=1",
            "engine.zebra: unknown key; known here: device, kind, timeout_seconds; of other kinds: cuts, deepspeed, "
            "num_stages, offload, stage",
        ),
        ("seed=-1", "seed: expected at least 0 (found -1)"),
        ("seed=true", "seed: expected a number, found true"),
        ("train.betas=[true, 0.9]", "train.betas[0]: expected a number, found true"),
        ("train.betas=[0.9]", "train.betas: entry 1 is missing (the first is 0)"),
        ("data.held_out=1.5", "data.held_out: expected less than 1.0 (found 1.5)"),
        ("data.sources=[]", "data.sources: expected at least 1 entries (found [])"),
        ("data.packing=maybe", "data.packing: expected true or false (found 'maybe')"),
        ("model.llm=7", "model.llm: expected keys with values (found 7)"),
        ("model.lora={targets: 5}", "model.lora.targets: expected 'all-linear' or expected a list (found 5)"),
        (
            "train.learning_rates={projectr: 1.0}",
            "train.learning_rates.projectr: known keys are 'projector', 'llm', 'llm.lora', 'vision', 'vision.lora' or "
            "'value_head'; did you mean 'projector'?",
        ),
        (
            "output_dir=2024",
            "output_dir: expected text; write it in quotes if it is meant as text, for example \"2024\" (found 2024)",
        ),
        ("data.sources[3].path=x", "data.sources[3].path: '3' is no place in a list of 1 (the first is 0)"),
        ("train.betas=[1", "train.betas: '[1' is not YAML (expected ',' or ']', but got '<stream end>'); "
         "quote it if it is text"),
        ("base=x.yaml", "base: is read from files only; name another file instead"),
    ],
)  # fmt: skip
def test_wrong_option(option, line):
    assert problems(write(GOOD), option) == [f"--options: {line}"]


def test_an_option_without_a_value_is_shown_as_it_was_typed():
    assert problems(write(GOOD), "seed") == [
        "--options 'seed': expected key=value, for example train.learning_rate=1e-4"
    ]


def test_options_that_exclude_each_other_name_both_places():
    assert problems(write(GOOD), "train.max_steps=5") == [
        "a.yaml:4: train: set exactly one of epochs and max_steps "
        "(epochs is set at a.yaml:4; max_steps is set at --options)"
    ]
    assert load_config("a.yaml", ["train.max_steps=5", "train.epochs=null"]).train.max_steps == 5


def test_a_missing_section_is_reported_at_the_file():
    assert problems(write("seed: 1\n")) == [
        f"a.yaml:1: {name}: missing, and it has no default" for name in ("output_dir", "model", "data", "train")
    ]


def test_a_value_left_open_in_a_base_must_be_given():
    write(GOOD.replace("output_dir: run", "output_dir: ???"), "base.yaml")
    assert problems(write("base: base.yaml")) == [
        "base.yaml:1: output_dir: must be given a value, here or with --options"
    ]
    assert load_config("a.yaml", ["output_dir=x"]).output_dir == "x"


# bases


def test_a_base_that_is_missing_names_the_nearest_file():
    write("seed: 1", "base/pretrain.yaml")
    assert problems(write(f"{GOOD}base: base/pretrian.yaml")) == [
        "a.yaml:5: base: base/pretrian.yaml does not exist; did you mean pretrain.yaml?"
    ]


def test_bases_that_form_a_circle_are_refused():
    write("base: a.yaml", "b.yaml")
    assert problems(write(f"base: b.yaml\n{GOOD}")) == [
        "b.yaml:1: base: the files form a circle: a.yaml -> b.yaml -> a.yaml"
    ]


@pytest.mark.parametrize("base", ["5", "{a: b}", "[x.yaml, 5]", "null"])
def test_a_base_that_is_no_path(base):
    write("seed: 1", "x.yaml")
    assert "a.yaml:1: base: expected the path of a YAML file, found" in problems(write(f"base: {base}\n{GOOD}"))[0]


# YAML's traps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("+.5", 0.5), (".inf", math.inf), ("-.inf", -math.inf), ("010", 10),
        ("0x1F", 31), ("12:30", "12:30"), ("no", "no"), ("off", "off"), ("yes", "yes"), ("y", "y"), ("2024-01-01",
        "2024-01-01"), ("1_000", "1_000"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("'5'", "5"), ("=", "="), ("<<", "<<"), ("1.2.3", "1.2.3"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2_means_them(text, value):
    assert read_layers(Path(write(f"a: {text}\n"))).values == {"a": value}


def test_no_and_off_are_false_where_a_flag_is_asked_and_text_where_text_is():
    config = load_config(write(GOOD), ["data.packing=no", "data.system=no", "train.tensorboard=on"])
    assert (config.data.packing, config.data.system, config.train.tensorboard) == (False, "no", True)


def test_time_of_day_stays_text_and_is_no_number():
    assert problems(write(GOOD), "train.epochs=null", "train.max_steps=12:30") == [
        "--options: train.max_steps: expected a whole number (found '12:30')"
    ]


def test_a_key_written_twice_is_an_error_with_both_places():
    assert problems(write(f"seed: 1\n{GOOD}seed: 2\n")) == [
        "a.yaml:6: seed: written twice, first at a.yaml:1; keep one"
    ]


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch marker']",
        "!!python/object/new:os.system ['touch marker']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:seq {}",
        "!run x",
        "!!set {a}",
        "!!binary aGk=",
        "!!timestamp 2024-01-01",
    ],
)
def test_tags_are_refused_and_nothing_runs(value, tmp_path):
    (line,) = problems(write(f"{GOOD}init_from: {value}\n"))
    assert line.startswith("a.yaml:5: init_from: the tag ")
    assert line.endswith("is refused: tags can make objects or run code")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "a.yaml:1: not YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence"),
        ("a: 1\n\tb: 2", "a.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("- a", "a.yaml:1: expected keys with values, found a list"),
        ("just text", "a.yaml:1: expected keys with values, found 'just text'"),
        ("a: &x 1\nb: *x", "a.yaml:2: not YAML: aliases (*name) are not read; refer to another key with ${a.b}"),
        ("a: &x [*x]", "a.yaml:1: not YAML: aliases (*name) are not read; refer to another key with ${a.b}"),
        ("a: {b: ${c}}", "a.yaml:1: not YAML: expected ',' or '}', but got '{' while parsing a flow mapping; "
         "write a ${...} that stands inside {...} or [...] in quotes"),
        ("a: 1\n---\nb: 2", "a.yaml:2: not YAML: but found another document expected a single document in the stream"),
        ("a: " + "[" * 5000, "a.yaml: nested too deeply"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config_says_why_and_where(text, line):
    assert line in problems(write(text))[0]


def test_a_file_that_is_no_text():
    Path("a.yaml").write_bytes(b"seed: \xff\n")
    assert problems("a.yaml") == ["a.yaml: not UTF-8 text (byte 6)"]


def test_a_byte_order_mark_is_ignored():
    Path("a.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config("a.yaml").output_dir == "run"


def test_a_number_of_5000_digits_is_an_error_not_a_crash():
    assert problems(write(f"{GOOD}seed: {'9' * 5000}\n"))[0].endswith("is no int")


# interpolation and secrets


def test_an_unset_variable_is_explained(monkeypatch):
    monkeypatch.delenv("VLM_TOKEN", raising=False)
    assert problems(write(f"{GOOD}init_from: ${{oc.env:VLM_TOKEN}}\n")) == [
        "a.yaml:5: init_from: ${oc.env:VLM_TOKEN}: environment variable VLM_TOKEN is not set; set it, or give a "
        "default: ${oc.env:VLM_TOKEN,default}"
    ]


def test_one_broken_interpolation_does_not_hide_the_others():
    text = GOOD.replace("run", "${nmae}/${") + "name: ${seeed}\ninit_from: ${init_from}\n"
    assert problems(write(text)) == [
        "a.yaml:1: output_dir: ${nmae}/${: not a complete ${...} (no viable alternative at input '${')",
        "a.yaml:5: name: ${seeed}: Interpolation key 'seeed' not found",
        "a.yaml:6: init_from: ${init_from}: Recursive interpolation detected",
    ]


def test_a_default_must_be_written_to_be_referred_to():
    assert problems(write(GOOD), "output_dir=${seed}") == [
        "--options: output_dir: ${seed}: seed is not written in this config; a default can be referred to only once it "
        "is written"
    ]


def test_a_misspelt_interpolation_names_the_nearest_key():
    text = GOOD.replace("run", "${data.templat}").replace("data: {", "data: {template: plain, ")
    assert problems(write(text))[0].endswith("did you mean ${data.template}?")


def test_what_a_variable_holds_is_never_shown(monkeypatch):
    monkeypatch.setenv("VLM_TOKEN", "s3cret")
    path = write(f"{GOOD}init_from: x/${{oc.env:VLM_TOKEN}}\n")
    assert load_config(path).init_from == "x/s3cret"
    assert "s3cret" not in resolve_for_log(path)
    assert "init_from: x/${oc.env:VLM_TOKEN}" in resolve_for_log(path)
    (line,) = problems(path, "seed=${oc.env:VLM_TOKEN}")
    assert line == "--options: seed: expected a whole number (found '${oc.env:VLM_TOKEN}')"
    assert "s3cret" not in "".join(problems(path, "model.lora={rank: 1, targets: {a: '${oc.env:VLM_TOKEN}'}}"))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.sampled_from(
        ["no", "on", "~", "1e-4", "12:30", "0x1f", "010", "null", "1_0", "=", "<<", "-", "5", "2001-01-01"]
    )
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8).filter(lambda t: "$" not in t),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(deadline=None)  # time says nothing here on a busy machine
@given(plain)
def test_the_written_config_reads_back_as_it_was_with_either_reader(value):
    """The run folder's config.yaml is read by OmegaConf as well (YAML 1.1 with its own numbers)."""
    text = OmegaConf.to_yaml(OmegaConf.create({"x": value}))
    path = Path("written.yaml")
    path.write_text(text, encoding="utf-8")
    assert read_layers(path).values == {"x": value}
    assert OmegaConf.to_container(OmegaConf.create(yaml.load(text, Loader=Loader))) == {"x": value}
    assert OmegaConf.to_container(OmegaConf.load(path)) == {"x": value}


# finding configs


def test_a_shipped_project_is_found_by_name_from_anywhere():
    assert find_config("tiny/pretrain").parts[-3:] == ("projects", "tiny", "pretrain.yaml")


def test_projects_below_the_current_folder_come_first():
    write(GOOD, "projects/tiny/pretrain.yaml")
    assert find_config("tiny/pretrain") == Path("projects/tiny/pretrain.yaml")


def test_base_files_are_no_projects():
    write(GOOD, "projects/mine/stage.yaml")
    assert "mine/stage" in shipped_projects()
    assert not any(name.startswith("base/") for name in shipped_projects())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/pretrian", "config tiny/pretrian does not exist. Nearest shipped: tiny/pretrain"),
        ("tiny", "tiny is a folder of configs; name one of them: tiny/finetune, tiny/pretrain"),
        ("nothing.yaml", "config nothing.yaml does not exist"),
    ],
)
def test_a_config_that_is_not_there(name, message):
    with pytest.raises(ConfigError, match=message):
        find_config(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "mine is a folder of configs; name one of them: mine/finetune.yaml, mine/pretrain.yaml"),
        ("mine/", "mine/ is a folder of configs; name one of them: mine/finetune.yaml, mine/pretrain.yaml"),
        ("mine/finetune.yml", "config mine/finetune.yml does not exist; did you mean mine/finetune.yaml?"),
        ("mine/pretrian", "config mine/pretrian does not exist; did you mean mine/pretrain.yaml?"),
        ("mine/empty", "mine/empty is a folder without configs (*.yaml). `vlm ls` lists the shipped ones"),
    ],
)
def test_a_folder_here_is_as_good_as_a_shipped_one(name, message):
    write(GOOD, "mine/finetune.yaml")
    write(GOOD, "mine/pretrain.yaml")
    Path("mine/empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    assert str(caught.value) == message


# editors


def test_the_schema_knows_base_requires_nothing_and_allows_interpolation():
    schema = json_schema()
    assert "base" in schema["properties"]
    assert "required" not in json.dumps(schema["$defs"])
    device = schema["properties"]["engine"]["anyOf"][0]["properties"]["device"]
    assert device["anyOf"][0]["enum"] == ["auto", "cpu", "cuda"]
    assert {"type": "string", "pattern": r"^\$\{.+\}$"} in device["anyOf"]
    task = schema["$defs"]["EvaluationConfig"]["properties"]["tasks"]["anyOf"][0]["items"]
    assert {"kind", "num_candidates"} <= task["properties"].keys()
    assert schema["$defs"]["VisionConfig"]["properties"]["layer"]["description"].startswith("Which block's output")


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("tiny/pretrain", ["model.llm.path=~/llm", "output_dir=~/run", "init_from=a/~b"])
    assert (config.model.llm.path, config.output_dir, config.init_from) == ("/home/me/llm", "/home/me/run", "a/~b")


@pytest.mark.slow
def test_reading_a_config_imports_no_heavy_package():
    code = (
        "import sys; from vlm.config import load_config; load_config('tiny/pretrain');"
        "print([m for m in ('torch', 'transformers', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
