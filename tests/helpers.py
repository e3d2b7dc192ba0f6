"""What several test files need: comparison, gradients, and a small problem to solve."""

import inspect

import torch

import dro

REF, REWARDS = (0.5, 0.3, 0.2), (1.0, 0.0, -1.0)  # three responses: reference, rewards


def close(value, expected, tol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tol,
        atol=tol,
    )


def gradients(function, *inputs):
    """d function / d each input, summed over the outputs; None where there is none."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)


def gradient(loss, logps, *rest):
    """d loss / d logps, summed over the outputs; the other arguments are constants."""
    return gradients(lambda x: loss(x, *rest), logps)[0]


def public(module):
    """Names of the functions that a file defines for others."""
    named = inspect.getmembers(module, inspect.isfunction)
    return {name for name, f in named if f.__module__ == module.__name__ and name[0] != "_"}


def check_constants(function, learned, **inputs):
    """Only the inputs named in `learned` get a gradient: the one that they get beside constants."""
    leaves = lambda chosen: {
        name: x.detach().clone().requires_grad_(name in chosen) for name, x in inputs.items()
    }
    alone, every = leaves(learned), leaves([k for k, x in inputs.items() if x.is_floating_point()])
    expected, value = function(**alone), function(**every)
    assert torch.equal(value, expected) and value.requires_grad == bool(learned)
    if learned:
        expected.square().sum().backward(), value.square().sum().backward()
    for name in inputs:
        if name in learned:
            assert every[name].grad.abs().sum() > 0, name
            assert torch.equal(every[name].grad, alone[name].grad), name
        else:
            assert every[name].grad is None, name


def tensors(ref=REF, rewards=REWARDS):
    """One prompt: log-probabilities of the reference and rewards, [1, M]."""
    row = lambda numbers: torch.tensor([numbers], dtype=torch.float64)
    return row(ref).log(), row(rewards)


def problem(B=5, M=7, seed=0):
    """B prompts with M enumerated responses: log-probabilities of a random reference, rewards."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, M, generator=generator, dtype=torch.float64)
    return draw().log_softmax(-1), 2 * draw()


def mean_kl(logps, ref_logps):
    return dro.kl_divergence(logps, ref_logps).mean().item()


def reward_of(logps, rewards):
    return (logps.exp() * rewards).sum(-1).mean().item()
