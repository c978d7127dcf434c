"""Names and tensors of other layouts, both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vlm.errors import CheckpointError
from vlm.models.weight_adapter import Rule, WeightAdapter, also, drop, join, rename, split, transpose
from vlm.models.weight_files import LazyTensors, WeightFiles, joined

HEADS, GROUP, WIDTH = 2, 3, 4  # of grouped attention: key heads, queries of each, width of a head


def ungroup(tensors):
    """[(GROUP queries, key, value) of each key head] -> queries, keys, values."""
    grouped = tensors[0].view(HEADS, GROUP + 2, WIDTH, -1)
    return [grouped[:, rows].flatten(0, 2) for rows in (slice(GROUP), slice(GROUP, GROUP + 1), slice(GROUP + 1, None))]


def group(tensors):
    rows = [tensor.view(HEADS, -1, WIDTH, tensor.shape[-1]) for tensor in tensors]
    return [torch.cat(rows, 1).flatten(0, 2)]


QKV = tuple(f"llm.layers.{{n}}.{name}_proj.{{leaf}}" for name in "qkv")
# the kinds of layout that language models came in: fused alike, fused by groups, fused in the middle, transposed
FUSED = WeightAdapter(
    "a made-up layout",
    (
        Rule(QKV, ("h.{n}.wqkv.{leaf}",), ungroup, group),
        split(("llm.layers.{n}.gate.weight", "llm.layers.{n}.up.weight"), "h.{n}.gate_up.weight", sizes=(5, 3)),
        join("llm.layers.{n}.experts", ("h.{n}.expert.0", "h.{n}.expert.1"), dim=1),
        transpose("llm.layers.{n}.down.weight", "h.{n}.conv.weight"),
        rename("llm.{*rest}", "other.{*rest}"),
    ),
)


def theirs(blocks: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {
        "wqkv.weight": (HEADS * (GROUP + 2) * WIDTH, 6), "wqkv.bias": (HEADS * (GROUP + 2) * WIDTH, 1),
        "gate_up.weight": (8, 6), "expert.0": (2, 3), "expert.1": (2, 3), "conv.weight": (7, 2),
    }  # fmt: skip
    found = {f"h.{n}.{name}": torch.randn(shape).to(dtype) for n in range(blocks) for name, shape in shapes.items()}
    return found | {"other.norm.weight": torch.randn(3).to(dtype)}


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 99))
def test_there_and_back_is_the_same_to_the_bit(blocks, dtype, seed):
    given_ = theirs(blocks, dtype, seed)
    ours = FUSED.to_ours(given_)
    assert ours.is_invertible
    back = FUSED.from_ours(ours)
    assert back.is_invertible
    assert back.keys() == given_.keys()
    for name, tensor in given_.items():
        assert back[name].dtype == dtype
        assert back[name].equal(tensor)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == ours.shapes


def test_grouped_attention_comes_apart_head_by_head():
    rows = torch.arange(HEADS * (GROUP + 2)).repeat_interleave(WIDTH)[:, None]
    ours = FUSED.to_ours({"h.0.wqkv.weight": rows})
    assert [ours[name.format(n=0, leaf="weight")][::WIDTH].flatten().tolist() for name in QKV] == [
        [0, 1, 2, 5, 6, 7], [3, 8], [4, 9],
    ]  # fmt: skip


def test_the_first_rule_that_knows_a_name_counts():
    adapter = WeightAdapter("x", (rename("head.weight", "model.out.weight"), rename("llm.{*rest}", "model.{*rest}")))
    assert list(adapter.to_ours(dict.fromkeys(["model.out.weight", "model.in.weight"], torch.zeros(1)))) == [
        "head.weight", "llm.in.weight",
    ]  # fmt: skip


def test_one_part_is_one_level_of_a_name():
    adapter = WeightAdapter("x", (rename("a.{n}.w", "b.{n}.w"),))
    ours = adapter.to_ours(dict.fromkeys(["b.10.w", "b.1.2.w", "bx1.w"], torch.zeros(1)))
    assert list(ours) == ["a.10.w"]
    assert list(ours.unread) == ["b.1.2.w", "bx1.w"]


def test_nothing_is_read_before_it_is_asked_for_and_one_group_is_held(tmp_path):
    given_, read = theirs(3, torch.float32, 0), []

    def read_one(name):
        read.append(name)
        return given_[name]

    lazy = LazyTensors({name: tuple(tensor.shape) for name, tensor in given_.items()}, read_one)
    ours = FUSED.to_ours(lazy)
    assert ours.shapes["llm.layers.2.q_proj.weight"] == (HEADS * GROUP * WIDTH, 6)
    assert read == []
    for name in ours:
        assert ours[name] is not None
        assert len(ours._held[1]) <= 3
    assert sorted(read) == sorted(given_)  # once each


def test_files_are_read_as_tensors_in_memory_are(tmp_path):
    save_file(theirs(2, torch.float32, 0), tmp_path / "model.safetensors")
    ours, expected = FUSED.to_ours(WeightFiles(str(tmp_path))), FUSED.to_ours(theirs(2, torch.float32, 0))
    assert ours.shapes == expected.shapes
    assert all(ours[name].equal(expected[name]) for name in ours)
    assert joined({"x": torch.zeros(2)}, ours).shapes == {"x": (2,), **ours.shapes}


def test_what_no_rule_reads_is_named():
    ours = FUSED.to_ours(
        {"other.norm": torch.zeros(1), "strange.weight": torch.zeros(1), "h.0.expert.0": torch.ones(1)}
    )
    assert list(ours) == ["llm.norm"]
    assert not ours.is_invertible
    with pytest.raises(CheckpointError) as caught:
        ours.refuse_unread("models/x")
    assert "models/x: of a made-up layout, 2 tensors cannot be read" in str(caught.value)
    assert "strange.weight: no rule is for it" in str(caught.value)
    assert "h.0.expert.0: h.0.expert.1 is missing beside it" in str(caught.value)


def test_what_is_dropped_or_has_two_names_has_no_way_back():
    adapter = WeightAdapter(
        "x", (drop("{*a}.inv_freq"), also("llm.{*rest}", "old.{*rest}"), rename("llm.{*r}", "{*r}"))
    )
    ours = adapter.to_ours({"old.w": torch.zeros(1), "rope.inv_freq": torch.zeros(1)})
    assert (list(ours), ours.unread, ours.is_invertible) == (["llm.w"], {}, False)
    assert list(adapter.from_ours(ours)) == ["w"]
    assert adapter.to_ours({"w": torch.zeros(1)}).is_invertible
    with pytest.raises(CheckpointError, match=r"llm\.w would come from two tensors"):
        adapter.to_ours({"old.w": torch.zeros(1), "w": torch.zeros(1)})


def test_sizes_that_do_not_add_up_name_the_tensor():
    with pytest.raises(CheckpointError, match=r"a made-up layout: h\.0\.gate_up\.weight cannot be made .*gate"):
        FUSED.to_ours({"h.0.gate_up.weight": torch.zeros(9, 6)})


def test_a_rule_whose_sides_have_other_parts_is_refused():
    with pytest.raises(ValueError, match="other parts"):
        rename("a.{n}", "b.{*rest}")
