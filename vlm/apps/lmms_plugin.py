"""What lmms-eval finds under its entry point `lmms_eval.models`: `--model vlm --model_args pretrained=EXPORT`.

It imports this module, wherever both are installed; the models of `lmms_model.py` only when one is asked for.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """One model with two classes: messages, and, with --force_simple, a text and its images, which tasks that
    compare log-likelihoods need."""
    from lmms_eval.models.registry_v2 import ModelManifest

    names = {"simple_class_path": "vlm.apps.lmms_model.SimpleModel", "chat_class_path": "vlm.apps.lmms_model.ChatModel"}
    return [ModelManifest(model_id="vlm", **names)]
