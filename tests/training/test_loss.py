"""The chunked loss equals a plain loop, in value and gradient."""

import pytest
import torch
from torch.nn import functional

from vllm_medusa.training.loss import IGNORE, medusa_one_loss, medusa_one_loss_reference

# Float64 on both sides; sums over chunks are added in another order.
FLOAT64_TOLERANCE = 1e-12


def _case(rows: int, ignored: float, heads: int = 3, size: int = 8, vocab: int = 17):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(heads, rows, size, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, size, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (rows, heads), generator=generator)
    labels[torch.rand(rows, heads, generator=generator) < ignored] = IGNORE
    return hidden.requires_grad_(), weight, labels


@pytest.mark.parametrize(
    ("rows", "chunk", "ignored"),
    [
        pytest.param(1, 4, 0.0, id="one-row"),
        pytest.param(8, 4, 0.3, id="whole-chunks"),
        pytest.param(9, 4, 0.3, id="last-chunk-partial"),
        pytest.param(5, 64, 0.3, id="chunk-larger-than-rows"),
        pytest.param(6, 2, 1.0, id="no-label-at-all"),
    ],
)
def test_value_and_gradient_equal_the_plain_loop(rows, chunk, ignored):
    hidden, weight, labels = _case(rows, ignored)
    head_weights = (0.8, 0.64, 0.512)
    loss, means = medusa_one_loss(hidden, weight, labels, head_weights, chunk)
    (grad,) = torch.autograd.grad(3 * loss, hidden)
    expected = medusa_one_loss_reference(hidden, weight, labels, head_weights)
    torch.testing.assert_close(loss, expected, atol=FLOAT64_TOLERANCE, rtol=0)
    if ignored < 1:
        (expected_grad,) = torch.autograd.grad(3 * expected, hidden)
        torch.testing.assert_close(grad, expected_grad, atol=FLOAT64_TOLERANCE, rtol=0)
        for k in range(3):
            expected_mean = functional.cross_entropy(
                hidden[k] @ weight.T, labels[:, k], ignore_index=IGNORE
            )
            if (labels[:, k] != IGNORE).any():
                torch.testing.assert_close(means[k], expected_mean, atol=1e-12, rtol=0)
    else:
        assert not grad.any()


@pytest.mark.gpu
def test_compiled_chunks_equal_the_plain_loop_on_a_gpu():
    hidden, weight, labels = (t.detach().cuda() for t in _case(16, 0.3))
    hidden = hidden.requires_grad_()
    head_weights = (0.8, 0.64, 0.512)
    loss, _ = medusa_one_loss(hidden, weight, labels, head_weights, 8)
    (grad,) = torch.autograd.grad(loss, hidden)
    expected = medusa_one_loss_reference(hidden, weight, labels, head_weights)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    # Float64, but exp and log of the device differ from the plain loop's by a few last bits.
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-10, rtol=0)


def test_gradient_check_by_finite_differences():
    hidden, weight, labels = _case(4, 0.25)
    assert torch.autograd.gradcheck(
        lambda h: medusa_one_loss(h, weight, labels, (0.8, 0.64, 0.512), 3)[0], hidden
    )


def test_rows_without_label_get_no_gradient():
    hidden, weight, labels = _case(6, 0.0)
    labels[2] = IGNORE
    loss, _ = medusa_one_loss(hidden, weight, labels, (1.0, 1.0, 1.0), 4)
    loss.backward()
    assert not hidden.grad[:, 2].any()
    assert hidden.grad[:, 1].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"labels": torch.zeros(4, 2).long()}, "labels has shape", id="labels"),
        pytest.param({"head_weights": (1.0,)}, "head_weights has 1", id="head-weights"),
        pytest.param({"lm_head_weight": torch.zeros(17, 8)}, "lm_head_weight is", id="dtype"),
    ],
)
def test_mismatched_arguments_are_named(change, message):
    hidden, weight, labels = _case(4, 0.0)
    arguments = {"lm_head_weight": weight, "labels": labels, "head_weights": (1.0, 1.0, 1.0)}
    with pytest.raises(ValueError, match=message):
        medusa_one_loss(hidden, **{**arguments, **change})
