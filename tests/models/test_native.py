"""Model types that the installed transformers has, and the advice for those that need code of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlm.models import native
from vlm.models.native import is_native, is_native_decoder, why_not_native

FOREIGN = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}


def test_the_types_read_from_its_files_are_those_that_transformers_has_when_it_is_imported():
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    assert [name for name in CONFIG_MAPPING if not is_native(name)] == []
    assert {name for name in CONFIG_MAPPING if is_native_decoder(name)} == DECODERS.keys() & set(CONFIG_MAPPING)
    assert not is_native("qwen")
    assert not is_native(None)
    assert not is_native_decoder("clip_vision_model")


def test_reading_them_imports_neither_torch_nor_transformers():
    code = "import sys; from vlm.models.native import *; assert is_native('llama'); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(eval(done.stdout))


def test_every_successor_that_is_named_is_one_that_transformers_has():
    for successors, _ in native._SUCCESSORS.values():
        assert [name for name in successors if not is_native_decoder(name)] == []
    assert [name for name in native._SUCCESSORS if is_native(name)] == []  # else the entry is out of date


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("qwen", "Take a model of type qwen2 or qwen3; `vlm convert legacy FOLDER OUT` writes the same weights"),
        ("internlm2", "type internlm3; `vlm convert legacy FOLDER OUT` writes"),
        ("baichuan", "qwen2, qwen3 or internlm3; 7B models: `vlm convert legacy"),
        ("chatglm", "Take a model of type glm or glm4; GLM-4 is published in native form too"),
        ("xverse", "Take a model of type qwen3 or llama; `vlm convert legacy"),
        ("stablelm_epoch", "the same weights are published with model_type stablelm"),
        ("of_nobody", "Take a model of type qwen2, qwen3, llama, mistral or internlm3. Such code"),
    ],
)
def test_each_type_gets_advice_that_works_with_the_installed_transformers(kind: str, advice: str):
    message = why_not_native({"model_type": kind, **FOREIGN}, trust_remote_code=False)
    assert message is not None
    assert message.startswith(f"model type {kind!r} is not native to transformers 5.")
    assert advice in message
    assert message.endswith("often fails under 5. After reading it, model.trust_remote_code: true tries it")
    assert why_not_native({"model_type": kind, **FOREIGN}, trust_remote_code=True) is None


def test_a_type_that_came_later_names_the_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "is_native", lambda name: name not in ("internlm2", "internlm3"))
    monkeypatch.setattr(native, "is_native_decoder", lambda name: name != "internlm3")
    for settings in ({}, FOREIGN):
        message = why_not_native({"model_type": "internlm3", **settings}, trust_remote_code=False)
        assert "transformers has it from 5.23: pip install -U transformers" in message
    message = why_not_native({"model_type": "internlm2", **FOREIGN}, trust_remote_code=False)
    assert "Take a model of type internlm3 (from transformers 5.23); `vlm convert legacy" in message


def test_a_type_without_code_is_probably_too_new():
    message = why_not_native({"model_type": "qwen9"}, trust_remote_code=True)
    assert message.endswith("Usually the model is newer than transformers: pip install -U transformers")
    assert "Take a model of type qwen2 or qwen3" in why_not_native({"model_type": "qwen"}, trust_remote_code=True)
    assert why_not_native({"model_type": "llama", **FOREIGN}, trust_remote_code=False) is None
