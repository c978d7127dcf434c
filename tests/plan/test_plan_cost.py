"""Operations of a micro-batch, counted by hand for the tiny decoder of conftest_plan."""

from conftest_plan import changed

from vlm.plan.cost import Load, micro_batch, row_work
from vlm.plan.shapes import read_shapes

LINEARS = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # query, key and value, output, MLP: parameters of a block
BLOCKS, VOCAB, WIDTH = 2, 32, 8


def test_a_frozen_decoder_below_a_trained_projector_is_passed_twice_and_a_trained_one_three_times(config):
    shape = read_shapes(config.model)
    load = Load(padding=10)
    frozen = micro_batch(config, shape, load)["decoder"].operations
    assert frozen == 2 * 10 * LINEARS * BLOCKS * 2
    full = micro_batch(changed(config, model={"trainable": ["llm"]}), shape, load)["decoder"].operations
    assert full == 2 * 10 * LINEARS * BLOCKS * 3
    again = changed(config, model={"trainable": ["llm"], "gradient_checkpointing": True})
    assert micro_batch(again, shape, load)["decoder"].operations == 2 * 10 * LINEARS * BLOCKS * 4


def by_record(config):
    return changed(config, model={"llm": {"path": config.model.llm.path, "attention": "varlen"}})


def test_attention_costs_by_pairs_and_the_head_by_supervised_tokens(config):
    config = by_record(config)
    shape = read_shapes(config.model)
    work = micro_batch(config, shape, Load(segments=((10, 2),), supervised=5))
    products = 2 * 20 * LINEARS * BLOCKS * 2
    assert (
        work["decoder"].operations - products == 100 * (2 + 5) * 2 * WIDTH * BLOCKS
    )  # pairs: 2 records of 10 * 10 / 2
    assert work["head"].operations == 2 * 5 * WIDTH * VOCAB * 2


def test_cached_features_cost_no_encoder(config):
    shape = read_shapes(config.model)
    load = Load(images=1)
    assert micro_batch(config, shape, load)["encoder"].operations > 0
    assert "encoder" not in micro_batch(changed(config, data={"cache_features": True}), shape, load)


def test_a_rows_work_is_its_operations_in_hundreds(config):
    assert row_work(config, read_shapes(config.model)).pair == 0  # SDPA with masks of whole rows
    config = by_record(config)
    work = row_work(config, read_shapes(config.model))
    assert work.token == round(2 * LINEARS * BLOCKS * 2 / 100)
    assert work.supervised == round(2 * WIDTH * VOCAB * 2 / 100)
    assert work.pair == round((2 + 5) * 2 * WIDTH * BLOCKS / 100)
    assert work.image > work.token
