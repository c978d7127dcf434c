"""Modules answer to their earlier names."""

from __future__ import annotations

import importlib
import warnings

import pytest

from vlm.moved import MOVED

EARLIER = """
    vlm.models.generate vlm.models.batched_generate vlm.models.sampling vlm.models.slot_cache vlm.export.streaming
    vlm.export.load vlm.export.messages vlm.export.weights vlm.export.manifest vlm.export.parts vlm.export.pins
    vlm.export.fingerprint vlm.export.assemble vlm.export.adapter vlm.export.card vlm.export.evidence vlm.export.folder
    vlm.export.older vlm.export.tokenizer vlm.export.load_base vlm.export.placement vlm.export.quantize
    vlm.chat.session
""".split()  # noqa: SIM905 - a list of names is read in columns


@pytest.mark.parametrize("old", EARLIER)
def test_an_earlier_name_gives_the_module(old):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == MOVED[old]


def test_whoever_uses_one_is_told_the_new_one():
    import sys

    sys.modules.pop("vlm.export.weights", None)
    with pytest.warns(DeprecationWarning, match=r"vlm\.export\.weights is vlm\.export\.run now"):
        importlib.import_module("vlm.export.weights")
