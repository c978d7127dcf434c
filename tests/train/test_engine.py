"""What one optimizer step must not depend on: how its examples are spread over rows and micro-batches."""

import copy
from dataclasses import replace

import pytest
import torch

from vlm.config import load_config
from vlm.data.build import build_data
from vlm.models.build import build_model
from vlm.models.llm import enable_gradient_checkpointing
from vlm.models.trainable import trained_weights
from vlm.objectives.lm import LanguageModeling
from vlm.train.engines.base import LossModule, poison
from vlm.train.engines.local import LocalEngine
from vlm.train.fragments import Fragment, FragmentReader, copy_to_host
from vlm.train.optim import build_optimizer


@pytest.fixture
def parts(config_file):
    config = load_config(config_file(model__lora={"rank": 4, "alpha": 8}, data__max_length=256))
    built = build_model(config.model, seed=1)
    data = build_data(
        config.data, built.tokenizer, built.image_spec, built.image_token_id,
        seed=0, global_batch_size=1, micro_batch_size=1,
    )  # fmt: skip
    scan = data.train.order.scan
    examples = [scan.reader.read(number) for number in range(6)]
    return config, built, data.train.collator, examples


def step(config, built, batches, checkpointing=False):
    """Loss, gradient norm and the trained weights after one step over the batches."""
    model = copy.deepcopy(built.model)
    if checkpointing:
        enable_gradient_checkpointing(model.llm)
    objective = LanguageModeling()
    engine = LocalEngine(
        LossModule(model, objective),
        build_optimizer(model, config.train),
        device=torch.device("cpu"),
        max_grad_norm=0.5,
    )
    weight = max(1, sum(map(objective.normalizer, batches)))
    output = engine.train_step(batches, weight, 1e-3 / config.train.learning_rate)
    return output, trained_weights(model)


def test_micro_batches_accumulation_and_packing_change_nothing(parts):
    config, built, collate, examples = parts
    a, b, c, d, e, f = examples
    reference, weights = step(config, built, [collate([[x] for x in examples])])
    arrangements = {
        "six micro-batches": [collate([[x]]) for x in examples],
        "two of three": [collate([[a], [b], [c]]), collate([[d], [e], [f]])],
        "packed in pairs": [collate([[a, b], [c, d], [e, f]])],
        "packed, accumulated": [collate([[c, a]]), collate([[e], [b]]), collate([[f, d]])],
        "with an empty row": [collate([[a, b], []]), collate([[c, d], [e, f]])],
    }
    for name, batches in arrangements.items():
        output, after = step(config, built, batches)
        assert output.loss == pytest.approx(reference.loss, rel=1e-5), name  # worst seen 2e-7
        assert output.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4), name  # worst seen 1e-6
        for key in weights:  # Adam's first update is about the learning rate, 1e-3, whatever the gradient
            difference = (after[key] - weights[key]).abs()
            assert difference.mean() < 1e-6, (name, key)


def test_gradient_checkpointing_changes_nothing(parts):
    config, built, collate, examples = parts
    batches = [collate([examples[:2], examples[2:4]])]
    plain, _ = step(config, built, batches)
    saved, _ = step(config, built, batches, checkpointing=True)
    assert saved.loss == plain.loss
    assert saved.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)


def test_every_supervised_token_counts_equally(parts):
    """The step's loss is the mean over tokens, not the mean of the micro-batches' means."""
    config, built, collate, examples = parts
    batches = [collate([[x]]) for x in examples]
    engine = LocalEngine(
        LossModule(built.model, LanguageModeling()),
        build_optimizer(built.model, config.train),
        device=torch.device("cpu"),
    )
    sums, weights = zip(*(engine.evaluate(batch) for batch in batches), strict=True)
    assert len(set(weights)) > 1
    output, _ = step(config, built, batches)
    assert output.loss == pytest.approx(sum(sums) / sum(weights), rel=1e-5)


def test_a_step_without_a_supervised_token_changes_nothing_and_is_no_nan(parts):
    config, built, collate, _ = parts
    output, _ = step(config, built, [collate([[]])])
    assert output.applied
    assert output.loss == 0.0
    assert output.grad_norm == 0.0


def test_text_alone_reaches_every_trained_weight_with_a_zero_gradient(parts):
    _, built, collate, examples = parts
    model = copy.deepcopy(built.model).train()
    batch = collate([[examples[0]]])
    ids = batch.input_ids.masked_fill(batch.input_ids == built.image_token_id, 5)
    model(ids, batch.position_ids).sum().backward()
    gradients = [p.grad for p in model.projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_rehearsal_leaves_out_the_parts_that_stand_still_as_a_step_does(parts):
    config, built, collate, examples = parts
    objective, batches = LanguageModeling(), [collate([[x] for x in examples[:2]])]
    engine = LocalEngine(
        LossModule(built.model, objective), build_optimizer(built.model, config.train),
        device=torch.device("cpu"), max_grad_norm=0.5,
    )  # fmt: skip
    built.model.train()
    weight = float(objective.normalizer(batches[0]))
    norms = []
    for still in (frozenset(), frozenset({"projector"})):
        engine.still = still
        torch.manual_seed(0)
        rehearsed = engine.rehearse(batches, weight, lambda: None)
        torch.manual_seed(0)
        norms.append((rehearsed[1], engine.train_step(batches, weight, 0.0).grad_norm))
    assert all(rehearsed == made for rehearsed, made in norms)
    assert norms[0][0] > norms[1][0]


def test_a_loss_that_is_not_finite_becomes_nan_and_any_other_stays_to_the_bit():
    """DeepSpeed looks at gradients alone, and those of an infinite loss may be finite."""
    for value in (float("inf"), -float("inf"), float("nan")):
        weight = torch.ones((), requires_grad=True)
        poison(weight + value).backward()
        assert torch.isnan(weight.grad)
    weight = torch.tensor(0.1, requires_grad=True)
    loss = poison(weight * 3)
    loss.backward()
    assert (loss.item(), weight.grad.item()) == ((weight * 3).item(), 3.0)


def test_a_copy_is_read_and_not_written(tmp_path):
    own, copy_ = torch.arange(3.0), torch.full((3,), 9.0)
    fragments = [Fragment.whole("embed", own), replace(Fragment.whole("head", copy_), is_copy=True)]
    copy_to_host(fragments).write(tmp_path, 0)
    assert set(FragmentReader(sorted(tmp_path.iterdir())).shapes) == {"embed"}
