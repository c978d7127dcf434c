"""`vlm models`: the families by name, held against what decides in the program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.data.template import TEMPLATES
from vlm.models.families import FAMILIES
from vlm.models.known import KNOWN, as_markdown, describe, measured
from vlm.models.legacy import LEGACY
from vlm.models.native import is_native_decoder

ROOT = Path(__file__).parents[2]
WANTED = (  # of users of LLM-Genie, XTuner and MiniGPT4Qwen, and of today
    "LLaMA 1", "Llama 2", "Llama 3", "BLOOM, BLOOMZ", "Falcon", "Baichuan", "InternLM 1", "InternLM 2, 2.5",
    "InternLM 3", "Qwen 1", "Qwen1.5, Qwen2, Qwen2.5", "Qwen3", "Qwen3.5", "XVERSE", "ChatGLM2", "ChatGLM3", "GLM-4",
    "Mistral", "Phi", "Gemma", "SmolLM", "Yi",
)  # fmt: skip


def test_the_families_that_people_ask_for_are_there():
    names = [known.name for known in KNOWN]
    assert [name for name in WANTED if not any(each.startswith(name) for each in names)] == []


def test_what_it_says_is_what_the_program_does():
    for known in KNOWN:
        assert set(known.templates) <= TEMPLATES.keys(), known.name
        if known.becomes is None:
            assert is_native_decoder(known.model_type), known.name
        else:
            assert known.becomes == LEGACY[known.model_type].becomes
    assert {known.model_type for known in KNOWN if known.becomes} == LEGACY.keys()
    for name, row in measured().items():
        if row["state"] == "right":
            assert (row["pipeline"] == "yes") == (FAMILIES[name].parts is not None), name
            assert (row["packing"] != "one by one") == FAMILIES[name].packs_by_positions or name in ("emu3",), name
    missing = [name for name, family in FAMILIES.items() if family.parts and name not in measured()]
    assert missing == []


def test_one_entry_says_class_targets_template_pipeline_and_proof():
    (entry,) = describe("Qwen1.5")
    assert entry["class"] == "Qwen2ForCausalLM"
    assert " ".join(entry["lora_targets"]) == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert (entry["templates"], entry["pipeline"], entry["is_trained"]) == (["chatml"], True, True)
    assert entry["proven"].startswith("measured: packed rows varlen, logits ")
    (converted,) = describe("xverse")
    assert converted["proven"].startswith("vlm convert legacy writes llama, compared with the original layer")


@pytest.mark.slow
def test_the_command_answers_within_a_second_without_torch():
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "from vlm.cli.main import app\n"
        "app(['models', 'qwen', '--json'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'jinja2'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)[0]["name"] == "Qwen 1"


def test_the_table_of_the_document_is_what_the_command_prints():
    document = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert as_markdown(describe()) in document, "put the output of vlm models --markdown into docs/families.md"
