"""What the papers compare with, against the oracle and by hand."""

import math

import oracle
import pytest
import torch

import baselines

L, GOOD, MISMATCHED = (0.5, -0.8, 1.2, 0.1), (True, False, True, False), (-0.4, 0.9, 0.2, 0.1)


def kto(ratios=L, good=GOOD, mismatched=MISMATCHED, beta=0.1, ref=-3.0, dtype=torch.float64):
    ratios, mismatched = torch.tensor(ratios, dtype=dtype), torch.tensor(mismatched, dtype=dtype)
    return baselines.kto_loss(
        ratios + ref, torch.full_like(ratios, ref), torch.tensor(good), mismatched - 1.0, mismatched * 0 - 1.0, beta
    )


def test_kto_by_hand_and_known_values():
    z = 0.1 * (-0.4 + 0.9 + 0.2 + 0.1) / 4
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    expected = [
        1 - sigmoid(0.05 - z),
        1 - sigmoid(z + 0.08),
        1 - sigmoid(0.12 - z),
        1 - sigmoid(z - 0.01),
    ]
    assert kto().tolist() == pytest.approx(expected, abs=1e-12)
    assert kto().mean().item() == pytest.approx(0.485011, abs=1e-6)
    assert kto(beta=5.0).tolist() == pytest.approx([0.182426, 0.006693, 0.006693, 0.377541], abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("mismatched", [MISMATCHED, (-2.0, -1.0), ()])
def test_kto_equals_the_oracle(beta, mismatched):
    expected = oracle.kto_loss(L, GOOD, mismatched or (0.0,), beta)
    assert kto(beta=beta, mismatched=mismatched).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_kto_pushes_the_desirable_up_and_the_others_down_and_z_has_no_gradient():
    s, other = (
        torch.randn(4, dtype=torch.float64).requires_grad_(),
        torch.randn(3, dtype=torch.float64).requires_grad_(),
    )
    zeros = torch.zeros(4, dtype=torch.float64)
    baselines.kto_loss(
        s, zeros, torch.tensor(GOOD), other, torch.zeros(3, dtype=torch.float64) - 9, 1.0
    ).sum().backward()
    assert (torch.sign(-s.grad) == torch.tensor([1, -1, 1, -1])).all() and other.grad is None


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_kto_refuses_impossible_beta(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        kto(beta=beta)


def test_kto_refuses_shapes_that_would_broadcast_and_labels_that_are_no_bools():
    s, good = torch.zeros(4), torch.tensor(GOOD)
    for wrong in ((s[:, None], s, good), (s, s[:1], good), (s, s, good[:, None]), (s, s, good.float())):
        with pytest.raises(ValueError, match="expected logps"):
            baselines.kto_loss(*wrong, s, s, 1.0)
    with pytest.raises(ValueError, match="mismatched"):
        baselines.kto_loss(s, s, good, s, s[:1], 1.0)


def test_kto_computes_half_precision_in_float32():
    loss = kto(dtype=torch.bfloat16, ref=0.0)
    assert loss.dtype == torch.float32
