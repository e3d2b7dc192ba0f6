"""The optimum of reward under a KL penalty, in closed form, and the reward-KL frontier (Richemond et al. 2024,
arXiv 2405.19107).

    max_pi  E_pi[r] - tau KL(pi || pi_ref)    is reached by    pi*(y|x) = pi_ref(y|x) exp((r(x, y) - V*(x)) / tau)     (Eq. 2)
    V*(x) = tau log E_{y ~ pi_ref} exp(r(x, y) / tau)

Among all policies whose KL, averaged over prompts, is at most K, none earns more than this one, with one tau for all
prompts and a normaliser for each. `frontier` finds it and says how near to it a policy is.
"""

import math
from typing import NamedTuple

import torch


def _check(*tensors):
    if any(t.shape != tensors[0].shape or t.dim() != 2 for t in tensors):
        raise ValueError(f"expected [B, M] tensors of one shape, got {[tuple(t.shape) for t in tensors]}")


def optimal_value(ref_logps, rewards, tau):
    """V*(x) = tau log sum_j exp(ref_logps_j + r_j / tau), over an enumerated set of responses (Eq. 2, arXiv 2405.19107).

    Args: ref_logps [B, M], log-probabilities that sum to 1 over the set; rewards [B, M]; tau > 0, in units of the reward.
    Returns: [B], in units of the reward. Raises: ValueError on other shapes or tau <= 0. Differs from the paper: nothing.

    >>> ref_logps, rewards = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[1.0, 0.0, -1.0]])
    >>> optimal_value(ref_logps, rewards, 1.0)
    tensor([0.5497])
    """
    _check(ref_logps, rewards)
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return tau * (ref_logps + rewards / tau).logsumexp(-1)


def optimal_logps(ref_logps, rewards, tau):
    """log pi*(y_j|x) = ref_logps_j + (r_j - V*(x)) / tau (Eq. 2, arXiv 2405.19107).

    Args, Raises: as `optimal_value`. Returns: [B, M], normalised within each row. Differs from the paper: nothing.

    >>> ref_logps, rewards = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[1.0, 0.0, -1.0]])
    >>> optimal_logps(ref_logps, rewards, 1.0).exp()
    tensor([[0.7844, 0.1731, 0.0425]])
    """
    return ref_logps + (rewards - optimal_value(ref_logps, rewards, tau)[:, None]) / tau


def kl_divergence(logps, ref_logps):
    """sum_j p_j (log p_j - log q_j) of each row, with 0 log 0 = 0: [B, M], [B, M] -> [B], nats.

    >>> kl_divergence(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log())       # log 2
    tensor([0.6931])
    """
    _check(logps, ref_logps)
    p = logps.exp()
    return torch.where(p > 0, p * (logps - ref_logps), 0.0).sum(-1)


def tau_at_kl(ref_logps, rewards, kl):
    """The one tau whose optimal policies have this KL on average over prompts (bisection on log tau).

    Args: ref_logps, rewards [B, M], as `optimal_value`; kl: nats. Returns: tau, or nan where no tau reaches this KL.

    >>> ref_logps, rewards = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[1.0, 0.0, -1.0]])
    >>> kl = kl_divergence(optimal_logps(ref_logps, rewards, 0.5), ref_logps).item()
    >>> round(tau_at_kl(ref_logps, rewards, kl), 3)
    0.5
    """
    reached = lambda tau: kl_divergence(optimal_logps(ref_logps, rewards, tau), ref_logps).mean().item()
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


def greedy_logps(ref_logps, rewards):
    """log pi* in the limit tau -> 0: the reference restricted to the best-rewarded responses, [B, M], [B, M] -> [B, M].

    >>> greedy_logps(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.0, 1.0, 1.0]])).exp()
    tensor([[0.0000, 0.6000, 0.4000]])
    """
    _check(ref_logps, rewards)
    return ref_logps.masked_fill(rewards < rewards.max(-1, keepdim=True).values, -torch.inf).log_softmax(-1)


class Frontier(NamedTuple):
    """A policy beside the optimum at its KL: rewards and KL averaged over prompts, standard errors by bootstrap over prompts."""

    reference_reward: float
    policy_reward: float
    kl: float
    tau: float  # of the optimum at this KL; 0 where the policy spends more KL than any optimum needs
    optimal_kl: float  # KL of that optimum: the policy's own, or less where tau is 0
    optimal_reward: float
    optimal_reward_se: float
    efficiency: float  # (policy - reference) / (optimal - reference)
    efficiency_se: float
    effective_sample_size: float  # of the optimum's weights, mean over prompts


def mixture_weights(log_ratios):
    """log b and log w: the reference and the policy on a sample drawn half from each, normalised within each prompt.

    Args: log_ratios [B, N] = log pi - log pi_ref of every sample, N/2 drawn from pi_ref and N/2 from pi.
    Returns: log b, log w [B, N] (self-normalised importance weights over the mixture (pi_ref + pi) / 2).

    >>> log_b, log_w = mixture_weights(torch.zeros(1, 4))              # pi = pi_ref: all weights equal
    >>> log_b.exp(), log_w.exp()
    (tensor([[0.2500, 0.2500, 0.2500, 0.2500]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    log_rho = math.log(2) - torch.nn.functional.softplus(log_ratios)  # pi_ref / mixture
    log_w = log_rho + log_ratios
    return log_rho.log_softmax(-1), log_w.log_softmax(-1)


def frontier(log_b, log_w, rewards, resamples=200, seed=0):
    """How near is a policy to the best one of its KL? Exact where the responses are enumerated, else by importance weights.

    Args: log_b, log_w [B, N]: log-probabilities of reference and policy over an enumerated set, or `mixture_weights`;
        rewards [B, N], the true ones; resamples: bootstrap draws over prompts, tau solved anew in each; seed: of the draws.
    Returns: Frontier; efficiency nan where the optimum earns no more than the reference. A sampled optimum misses mass,
        so its efficiency is an upper estimate.

    >>> log_b, rewards = torch.tensor([[0.5, 0.3, 0.2]] * 2).log(), torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 0.0]])
    >>> f = frontier(log_b, optimal_logps(log_b, rewards, 0.7), rewards)
    >>> round(f.tau, 4), round(f.efficiency, 4)                         # the optimum itself
    (0.7, 1.0)
    """
    _check(log_b, log_w, rewards)
    log_b, log_w, rewards = log_b.double(), log_w.double(), rewards.double()
    base, earned = (log_b.exp() * rewards).sum(-1), (log_w.exp() * rewards).sum(-1)  # [B]
    kl = kl_divergence(log_w, log_b)  # [B]
    tau = tau_at_kl(log_b, rewards, kl.mean().item())
    beyond = math.isnan(tau)  # more KL than any optimum needs: the best is then the limit tau -> 0
    tau = 0.0 if beyond else tau
    best_logps = greedy_logps(log_b, rewards) if beyond else optimal_logps(log_b, rewards, tau)  # [B, N]
    best = best_logps.exp()
    optimal = (best * rewards).sum(-1).mean().item()

    # Bootstrap: KL and reward of the optimum on a grid of tau, for each prompt, then means of resamples.
    scale = (rewards.max() - rewards.min()).clamp_min(1e-12)
    optima = [optimal_logps(log_b, rewards, t.item()) for t in scale * torch.logspace(3, -3, 121, dtype=torch.float64)]
    optima.append(greedy_logps(log_b, rewards))
    grid_kl = torch.stack([kl_divergence(o, log_b) for o in optima])  # [G, B], rising along G
    grid_reward = torch.stack([(o.exp() * rewards).sum(-1) for o in optima])
    draws = torch.randint(len(kl), (resamples, len(kl)), generator=torch.Generator().manual_seed(seed))
    optima, gains = [], []
    for rows in draws:
        x, y, k = grid_kl[:, rows].mean(-1), grid_reward[:, rows].mean(-1), kl[rows].mean()
        i = torch.searchsorted(x, k).clamp(1, len(x) - 1)
        at = y[i - 1] + (y[i] - y[i - 1]) * ((k - x[i - 1]) / (x[i] - x[i - 1]).clamp_min(1e-12)).clamp(0, 1)
        optima.append(at)
        gains.append((earned[rows].mean() - base[rows].mean()) / (at - base[rows].mean()))
    room = optimal - base.mean().item()  # what there is to gain; rounding alone is nothing
    efficiency = (earned.mean() - base.mean()).item() / room if room > 1e-12 * rewards.abs().max().item() else math.nan
    return Frontier(
        reference_reward=base.mean().item(),
        policy_reward=earned.mean().item(),
        kl=kl.mean().item(),
        tau=tau,
        optimal_kl=kl_divergence(best_logps, log_b).mean().item(),
        optimal_reward=optimal,
        optimal_reward_se=torch.stack(optima).std().item(),
        efficiency=efficiency,
        efficiency_se=torch.stack(gains).std().item(),
        effective_sample_size=(1 / best.square().sum(-1)).mean().item(),
    )
