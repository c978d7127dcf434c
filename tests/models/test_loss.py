import math

import pytest
import torch
import torch.nn.functional as F

from vlm.batch import IGNORE_INDEX
from vlm.models.loss import chunked_cross_entropy, select_supervised

X = IGNORE_INDEX


def test_each_label_is_paired_with_the_state_before_it():
    hidden = torch.arange(8.0).reshape(2, 4, 1)  # row 0: 0 1 2 3, row 1: 4 5 6 7
    labels = torch.tensor([[X, X, 12, 13], [X, 21, X, X]])
    states, targets = select_supervised(hidden, labels)
    assert states.flatten().tolist() == [1, 2, 4]
    assert targets.tolist() == [12, 13, 21]


def test_a_uniform_head_costs_log_vocabulary_per_token():
    hidden = torch.zeros(1, 5, 4)
    labels = torch.tensor([[X, 1, 2, X, 0]])
    loss = chunked_cross_entropy(hidden, labels, lambda states: states.new_zeros(len(states), 10))
    assert loss.item() == pytest.approx(3 * math.log(10), rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 1000])
def test_any_chunk_size_gives_the_loss_and_gradients_of_the_full_computation(chunk_tokens):
    torch.manual_seed(0)
    hidden = torch.randn(3, 11, 8, requires_grad=True)
    head = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (3, 11)).masked_fill(torch.rand(3, 11) < 0.4, X)

    full = F.cross_entropy((hidden @ head.T)[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1), reduction="sum")
    expected = torch.autograd.grad(full, [hidden, head])
    loss = chunked_cross_entropy(hidden, labels, lambda states: states @ head.T, chunk_tokens)
    gradients = torch.autograd.grad(loss, [hidden, head])

    assert loss.item() == pytest.approx(full.item(), rel=1e-6)  # worst seen 2e-7
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)  # worst seen 5e-7 absolute


def test_a_batch_without_supervised_tokens_gives_zero_and_zero_gradients_not_nan():
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.full((2, 4), X), lambda states: states @ torch.randn(3, 9))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
