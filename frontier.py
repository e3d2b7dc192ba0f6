"""The reward-KL frontier: most reward of any policy at a given KL, and how near to it a policy is.

Among all policies whose KL to the reference, averaged over prompts, is at most K, none earns more
than pi* = pi_ref exp((r - V*) / tau), with one tau for all prompts and a normaliser V* for each
(dro.optimal_logps). Matching the KL prompt by prompt, or one normaliser for all, is wrong.

    tau_at_kl(ref_logps, rewards, kl)     -> tau of the optimum at this KL
    optimum_at_kl(log_b, rewards, kl)     -> the same tau, and the optimum itself
    frontier_curve(log_b, rewards)        -> the whole curve, to draw
    frontier(log_b, log_w, rewards)       -> Frontier: a policy beside the optimum at its own KL
    reported_efficiency(frontier, kl)     -> how near, where it means something
    mixture_weights(log_ratios)           -> log_b, log_w where the responses are sampled

log_b and log_w are the log-weights of the responses under the reference (the base) and under the
policy. [B, N] is N responses of B prompts: all there are (exact), or a sample (an upper estimate of
the policy's efficiency, because a sampled optimum misses what was never drawn).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dro import kl_divergence, optimal_logps

ENOUGH_SAMPLES = 20  # effective ones: what an optimum of fewer would say is not told


def _check(*tensors: Tensor) -> None:
    if any(t.shape != tensors[0].shape or t.dim() != 2 for t in tensors):
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(f"expected [B, N] tensors of one shape, got {shapes}")


def tau_at_kl(ref_logps: Tensor, rewards: Tensor, kl: float) -> float:
    """The one tau whose optimal policies have this mean KL over prompts (bisection on log tau).

    Args: ref_logps, rewards [B, N], as `dro.optimal_value`; kl: nats.
    Returns: tau, or nan where no tau reaches this KL.
    Raises: ValueError on other shapes.
    Differs from the paper: derived here; the paper fixes tau and leaves the KL free.

    >>> ref_logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> rewards = torch.tensor([[1.0, 0.0, -1.0]])
    >>> kl = kl_divergence(optimal_logps(ref_logps, rewards, 0.5), ref_logps).item()
    >>> round(tau_at_kl(ref_logps, rewards, kl), 3)
    0.5
    """

    def reached(tau):
        return kl_divergence(optimal_logps(ref_logps, rewards, tau), ref_logps).mean().item()

    scale = (rewards.max() - rewards.min()).item()
    if scale == 0:
        return math.nan
    low, high = math.log(1e-4 * scale), math.log(1e4 * scale)  # of log tau; KL falls as tau grows
    if reached(math.exp(low)) < kl:
        return math.nan
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(math.exp(middle)) > kl else (low, middle)
    return math.exp((low + high) / 2)


def greedy_logps(ref_logps: Tensor, rewards: Tensor) -> Tensor:
    """log pi* in the limit tau -> 0: the reference restricted to the best-rewarded responses.

    Args: ref_logps, rewards [B, N], as `dro.optimal_value`.
    Returns: [B, N], -inf for what earns less than the best.
    Raises: ValueError on other shapes.

    >>> ref_logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> greedy_logps(ref_logps, torch.tensor([[0.0, 1.0, 1.0]])).exp()
    tensor([[0.0000, 0.6000, 0.4000]])
    """
    _check(ref_logps, rewards)
    best = rewards.max(-1, keepdim=True).values
    return ref_logps.masked_fill(rewards < best, -torch.inf).log_softmax(-1)


def optimum_at_kl(log_b: Tensor, rewards: Tensor, kl: float) -> tuple[float, Tensor]:
    """The best policy of this KL: its tau and its log-weights [B, N].

    Where no tau reaches that much KL, it is the limit tau -> 0 at less, and tau is 0.

    Args: log_b, rewards [B, N], as `frontier`; kl: nats, mean over prompts.
    Raises: ValueError on other shapes.
    """
    tau = tau_at_kl(log_b, rewards, kl)
    if math.isnan(tau):
        return 0.0, greedy_logps(log_b, rewards)
    return tau, optimal_logps(log_b, rewards, tau)


class Frontier(NamedTuple):
    """A policy beside the optimum at its KL: means and bootstrap standard errors over prompts."""

    reference_reward: float
    policy_reward: float
    kl: float
    tau: float  # of the optimum; 0 where the policy spends more KL than any optimum needs
    optimal_kl: float  # KL of that optimum: the policy's own, or less where tau is 0
    optimal_reward: float
    optimal_reward_se: float
    efficiency: float  # (policy - reference) / (optimal - reference)
    efficiency_se: float
    effective_sample_size: float  # of the optimum's weights, mean over prompts


def reported_efficiency(best: Frontier, kl: float, enumerated: bool = False) -> dict[str, float]:
    """efficiency and efficiency_se, nan where they would mean nothing.

    That is where the policy has hardly moved, where a few samples hold nearly all of the optimum's
    weight, or where there is nothing to gain. Beyond the frontier's end the optimum is the best
    response drawn, whatever its weight.

    Args: kl: of the policy, as reported; enumerated: the responses were all there are.
    """
    enough = enumerated or best.effective_sample_size >= ENOUGH_SAMPLES or best.tau == 0
    told = kl >= 0.05 and enough and math.isfinite(best.efficiency)
    return {
        "efficiency": best.efficiency if told else math.nan,
        "efficiency_se": best.efficiency_se if told else math.nan,
    }


def mixture_weights(log_ratios: Tensor) -> tuple[Tensor, Tensor]:
    """log b, log w: reference and policy on a sample half from each, normalised within each prompt.

    Args: log_ratios [B, N] = log pi - log pi_ref of every sample, N/2 from pi_ref and N/2 from pi.
    Returns: log b, log w [B, N], self-normalised importance weights over the mixture
        (pi_ref + pi) / 2.

    >>> log_b, log_w = mixture_weights(torch.zeros(1, 4))  # pi = pi_ref: all weights equal
    >>> log_b.exp(), log_w.exp()
    (tensor([[0.2500, 0.2500, 0.2500, 0.2500]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    log_rho = math.log(2) - torch.nn.functional.softplus(log_ratios)  # pi_ref / mixture
    log_w = log_rho + log_ratios
    return log_rho.log_softmax(-1), log_w.log_softmax(-1)


def effective_sample_size(logps: Tensor) -> float:
    """1 / sum p^2 of weights [B, N], given as logs: how many samples they amount to, mean over B.

    >>> round(effective_sample_size(torch.tensor([[0.5, 0.5, 0.0]]).log()), 4)
    2.0
    """
    return (1 / logps.exp().square().sum(-1)).mean().item()


def frontier_curve(log_b: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """KL and reward of the optimum for every prompt, from no KL to the limit tau -> 0.

    Args: log_b, rewards [B, N], as `frontier`.
    Returns: kl, reward [G, B], rising along G; average over B for the curve.
    Raises: ValueError on other shapes.

    >>> kl, reward = frontier_curve(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    >>> kl[0].item() < 1e-6, round(kl[-1].item(), 4), reward[-1].item()  # log 2 nats, best reward
    (True, 0.6931, 1.0)
    """
    scale = (rewards.max() - rewards.min()).clamp_min(1e-12)
    taus = scale * torch.logspace(3, -3, 121, dtype=rewards.dtype)
    optima = [optimal_logps(log_b, rewards, tau.item()) for tau in taus]
    optima.append(greedy_logps(log_b, rewards))
    return (
        torch.stack([kl_divergence(optimum, log_b) for optimum in optima]),
        torch.stack([(optimum.exp() * rewards).sum(-1) for optimum in optima]),
    )


def frontier(
    log_b: Tensor, log_w: Tensor, rewards: Tensor, resamples: int = 200, seed: int = 0
) -> Frontier:
    """How near is a policy to the best one of its KL? Exact where the responses are enumerated.

    Args: log_b, log_w [B, N]: log-probabilities of reference and policy over an enumerated set, or
        `mixture_weights`; rewards [B, N], the true ones; resamples: bootstrap draws over prompts,
        tau solved anew in each; seed: of the draws.
    Returns: Frontier; efficiency is nan where the optimum earns no more than the reference.
    Raises: ValueError on other shapes.

    >>> log_b = torch.tensor([[0.5, 0.3, 0.2]] * 2).log()
    >>> rewards = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 0.0]])
    >>> f = frontier(log_b, optimal_logps(log_b, rewards, 0.7), rewards)
    >>> round(f.tau, 4), round(f.efficiency, 4)  # the optimum itself
    (0.7, 1.0)
    """
    _check(log_b, log_w, rewards)
    log_b, log_w, rewards = log_b.double(), log_w.double(), rewards.double()
    base, earned = (log_b.exp() * rewards).sum(-1), (log_w.exp() * rewards).sum(-1)  # [B]
    kl = kl_divergence(log_w, log_b)  # [B]

    tau, best_logps = optimum_at_kl(log_b, rewards, kl.mean().item())
    best = best_logps.exp()  # [B, N]
    optimal = (best * rewards).sum(-1).mean().item()

    # Bootstrap: each prompt's optimal KL and reward on a grid of tau, then means of resamples.
    grid_kl, grid_reward = frontier_curve(log_b, rewards)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(kl), (resamples, len(kl)), generator=generator)
    optima, gains = [], []
    for rows in draws:
        mean_kl, mean_reward = grid_kl[:, rows].mean(-1), grid_reward[:, rows].mean(-1)  # [G]
        spent, start = kl[rows].mean(), base[rows].mean()
        i = torch.searchsorted(mean_kl, spent).clamp(1, len(mean_kl) - 1)
        step = (mean_kl[i] - mean_kl[i - 1]).clamp_min(1e-12)
        share = ((spent - mean_kl[i - 1]) / step).clamp(0, 1)
        optimum = mean_reward[i - 1] + (mean_reward[i] - mean_reward[i - 1]) * share
        optima.append(optimum)
        gains.append((earned[rows].mean() - start) / (optimum - start))

    # What there is to gain; the rounding of float32 log-probs alone is nothing.
    room = optimal - base.mean().item()
    gains = torch.stack(gains)
    gains = gains[gains.isfinite()]  # not 0 / 0, where the drawn prompts have nothing to gain
    efficiency = math.nan
    if room > 1e-6 * rewards.abs().max().item():
        efficiency = (earned.mean() - base.mean()).item() / room
    return Frontier(
        reference_reward=base.mean().item(),
        policy_reward=earned.mean().item(),
        kl=kl.mean().item(),
        tau=tau,
        optimal_kl=kl_divergence(best_logps, log_b).mean().item(),
        optimal_reward=optimal,
        optimal_reward_se=torch.stack(optima).std().item(),
        efficiency=efficiency,
        efficiency_se=gains.std().item() if len(gains) > 1 else math.nan,
        effective_sample_size=effective_sample_size(best_logps),
    )
