"""What one decoder block keeps for its backward pass, by hand. 10 tokens; see the table in vlm/plan/blocks.py."""

from __future__ import annotations

import pytest

from vlm.models.config import LoRAConfig
from vlm.plan.blocks import decoder_block, head, vision
from vlm.plan.numerics import Numerics, Workload
from vlm.plan.shapes import VisionShape

FROZEN = Numerics(frozen=2, compute=2, residual=2, attention="sdpa", on_gpu=False)
TRAINED = Numerics(frozen=2, compute=2, residual=4, attention="sdpa", on_gpu=False)
FLOAT32 = Numerics(frozen=4, compute=4, residual=4, attention="sdpa", on_gpu=False)
WORK = Workload(rows=1, length=10, num_images=0, supervised=10)

NORMS = 2 * (4 * 8 + 4)  # per token: the input in float32 and a scale, twice
HEADS = 2 * 4 * 4 * 2 + 4 * 2  # query, key and value repeated for both heads, output; a log-sum per head
MLP = 3 * 16 * 2  # gate, activated gate, up
MASK = 10 * 10 * 2


def block(shape, numerics, work=WORK, **more):
    arguments = {"is_trained": False, "lora": None, "checkpointing": False} | more
    return decoder_block(shape, 0, work, numerics, **arguments)


def test_frozen_block_keeps_no_inputs_of_linear_layers(shape):
    assert block(shape, FROZEN).saved == 10 * (NORMS + HEADS + MLP) + MASK == 2600


def test_without_restarts_there_is_no_mask_and_keys_are_not_repeated(shape):
    work = Workload(1, 10, 0, 10, has_restarts=False)
    assert block(shape, FROZEN, work).saved == 10 * (NORMS + HEADS - 2 * 4 * 2 + MLP) == 2240


def test_flash_attention_needs_no_mask(shape):
    flash = Numerics(2, 2, 2, "flash_attention_2", True)
    assert block(shape, flash).saved == 2240


def test_trained_block_keeps_inputs_and_copies_of_its_weights(shape):
    part = block(shape, TRAINED, is_trained=True)
    inputs = 2 * (3 * 8 + 2 * 8 + 16)  # query, key, value; gate, up; down. The output projection reads attention's own
    assert part.saved == 10 * (NORMS + 2 * 4 * 8 + HEADS + MLP + inputs) + MASK == 4360
    assert part.copies == 2 * (2 * 64 + 2 * 32 + 3 * 128)  # every matrix in bf16
    assert (part.weights, part.trained, part.gradients) == (4 * 608, 608, 4 * 608)


def test_adapters_keep_a_bf16_input_each_and_what_lies_between(shape):
    part = block(shape, FROZEN, lora=LoRAConfig(rank=2))
    inputs, between = 2 * (6 * 8 + 16), 7 * 2 * 2
    assert part.saved == 10 * (NORMS + HEADS + MLP + inputs + between) + MASK == 4160
    assert part.trained == 2 * (2 * 16 + 2 * 12 + 3 * 24)  # rank * (in + out): q and o, k and v, the MLP's three
    assert part.weights == 2 * 608 + 4 * part.trained


def test_in_float32_adapters_share_inputs(shape):
    part = block(shape, FLOAT32, lora=LoRAConfig(rank=2))
    inputs, between = 4 * (8 + 8 + 16), 7 * 2 * 4  # one for query, key and value; one for gate and up; the product
    heads = 2 * 4 * 4 * 4 + 4 * 2
    assert part.saved == 10 * (NORMS + heads + 2 * MLP + inputs + between) + 2 * MASK == 6240


@pytest.mark.parametrize(("on_gpu", "each"), [(True, 1), (False, 4)])
def test_dropout_keeps_a_mask_on_the_gpu_and_factors_on_the_cpu(on_gpu, each, shape):
    numerics = Numerics(2, 2, 2, "sdpa", on_gpu)
    with_dropout = block(shape, numerics, lora=LoRAConfig(rank=2, dropout=0.1)).saved
    without = block(shape, numerics, lora=LoRAConfig(rank=2)).saved
    assert with_dropout - without == 10 * each * (6 * 8 + 16)


def test_checkpointing_keeps_the_input_of_a_block_alone(shape):
    part = block(shape, FROZEN, checkpointing=True)
    assert part.saved == 10 * 8 * 2
    assert part.recomputed == block(shape, FROZEN).saved


def test_logits_of_one_chunk_stay_and_of_several_are_made_again(shape):
    whole = head(shape, WORK, FROZEN, is_trained=False, chunk_tokens=10)
    norm = 10 * (4 * 8 + 4)
    assert whole.saved == norm + 4 * 10 * 32
    assert whole.backward == 8 * 10 * 32  # two gradients beside the log-softmax that was kept
    chunked = head(shape, WORK, FROZEN, is_trained=False, chunk_tokens=5)
    assert chunked.saved == norm + 10 * 8 * 2
    assert chunked.backward == 12 * 5 * 32 + 10 * 8 * 2


def test_blocks_of_a_trained_encoder_keep_their_inputs_only_with_checkpointing():
    shape = VisionShape(
        numel=100, width=8, num_patches=4, num_tokens=5, num_blocks=3, block_width=8, intermediate=16,
        activation_copies=1, image_size=14,
    )  # fmt: skip
    work = Workload(rows=1, length=10, num_images=2, supervised=10)
    plain = vision(shape, work, FLOAT32, is_trained=True, is_cached=False)
    again = vision(shape, work, FLOAT32, is_trained=True, is_cached=False, checkpointing=True)
    assert again.saved == 3 * 2 * 5 * 8 * 4  # blocks, images, tokens, width, bytes
    assert again.recomputed == plain.saved / 3  # one block at a time
    assert vision(shape, work, FLOAT32, is_trained=False, is_cached=False, checkpointing=True).saved == 0
