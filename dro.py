"""DRO: direct reward optimisation (Richemond et al. 2024, arXiv 2405.19107), and the optimum that it aims at.

    max_pi  E_pi[r] - tau KL(pi || pi_ref)    is reached by    pi*(y|x) = pi_ref(y|x) exp((r(x, y) - V*(x)) / tau)     (Eq. 2)
    V*(x) = tau log E_{y ~ pi_ref} exp(r(x, y) / tau)

so r - V* - tau log pi*/pi_ref = 0 for every response, and DRO learns policy and value by making that residual small on
responses from anywhere, one reward each (Eq. 4). No pairs, no samples from the policy. DRO is not "distributionally robust
optimisation". Losses take flat tensors [N], one element a response.

Among all policies whose KL, averaged over prompts, is at most K, none earns more than pi*, with one tau for all prompts
and a normaliser for each. `frontier` finds it and says how near to it a policy is.
"""

import math
from typing import NamedTuple

import torch


def _check(*tensors, form="[B, M]"):
    if any(t.shape != tensors[0].shape or t.dim() != form.count(",") + 1 for t in tensors):
        raise ValueError(f"expected {form} tensors of one shape, got {[tuple(t.shape) for t in tensors]}")


def _flat(tau, *tensors):
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    _check(*tensors, form="[N]")
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


# --------------------------------------------------------------------------------------------------------------------- losses


def dro_loss(logps, ref_logps, rewards, values, tau):
    """The squared residual 1/2 (r - V - tau (logps - ref_logps))^2, one loss for policy and value (Eq. 4, arXiv 2405.19107).

    Zero for every response if and only if the policy is pi* and V is V* (where the data cover what pi_ref can say).

    Args: logps, ref_logps [N], sums over tokens, nats; rewards [N]; values [N], V(x) of each response's prompt; tau > 0.
    Returns: [N], squared units of the reward. Raises: ValueError on other shapes or tau <= 0. Differs from the paper: nothing.

    >>> one = lambda x: torch.tensor([x])
    >>> dro_loss(one(-3.0), one(-3.5), one(1.0), one(0.2), 0.5)         # residual 1 - 0.2 - 0.5 x 0.5 = 0.55
    tensor([0.1513])
    """
    logps, ref_logps, rewards, values = _flat(tau, logps, ref_logps, rewards, values)
    return 0.5 * (rewards - values - tau * (logps - ref_logps)).square()


def dro_v_losses(logps, ref_logps, rewards, values, tau):
    """DRO-V, Algorithm 1: the policy's loss and the value's, each blind to the other's gradient (Eqs. 7, 8, arXiv 2405.19107).

        policy  -logps (r - V) + tau/2 (logps - ref_logps)^2     gradient: that of `dro_loss` over tau, V held fixed
        value   1/2 (r - tau (logps - ref_logps) - V)^2          gradient: that of `dro_loss`, the policy held fixed

    Args, Raises: as `dro_loss`. Returns: policy losses [N], value losses [N]; add their means (two networks), or step apart.
    Differs from the paper: the box of Algorithm 1 prints 1/2 where Eq. 8 over tau gives tau/2. The two agree at tau = 1
        only; with 1/2 the policy ends elsewhere or diverges (`python -m experiments.exact` shows both).

    >>> one = lambda x: torch.tensor([x])
    >>> dro_v_losses(one(-3.0), one(-3.5), one(1.0), one(0.2), 0.5)     # 3 x 0.8 + 0.25 x 0.25; 1/2 (1 - 0.25 - 0.2)^2
    (tensor([2.4625]), tensor([0.1513]))
    """
    logps, ref_logps, rewards, values = _flat(tau, logps, ref_logps, rewards, values)
    ratios = logps - ref_logps
    policy = -logps * (rewards - values.detach()) + tau / 2 * ratios.square()
    return policy, 0.5 * (rewards - tau * ratios.detach() - values).square()


def dro_p_loss(logps, ref_logps, rewards, tau):
    """DRO-P: no value network, the batch's mean stands for it: 1/2 Var_batch(r - tau (logps - ref_logps)) (Appendix B).

    The variance mixes prompts, so the optimum is pi* only if V* is the same for all of them; else it is biased.

    Args, Raises: as `dro_loss`. Returns: a scalar (the biased variance; 0 for one response).
    Differs from the paper: the printed update lacks the centring of r and has tau for tau/2; its two-sample loss needs 1/4.

    >>> two = lambda *x: torch.tensor(x)
    >>> dro_p_loss(two(-3.0, -5.0), two(-3.5, -4.2), two(1.0, -0.5), 0.5)   # r - tau l = 0.75, -0.1: 1/2 x 0.425^2
    tensor(0.0903)
    """
    logps, ref_logps, rewards = _flat(tau, logps, ref_logps, rewards)
    return 0.5 * (rewards - tau * (logps - ref_logps)).var(correction=0)


# -------------------------------------------------------------------------------------------------------- optimum and frontier


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
    """KL(p || q) = sum_j p_j (log p_j - log q_j) of each row, with 0 log 0 = 0.

    Args: logps, ref_logps [B, M], log p and log q. Returns: [B], nats. Raises: ValueError on other shapes.

    >>> kl_divergence(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log())       # log 2
    tensor([0.6931])
    """
    _check(logps, ref_logps)
    p = logps.exp()
    return torch.where(p > 0, p * (logps - ref_logps), 0.0).sum(-1)


def tau_at_kl(ref_logps, rewards, kl):
    """The one tau whose optimal policies have this KL on average over prompts (bisection on log tau).

    Args: ref_logps, rewards [B, M], as `optimal_value`; kl: nats. Returns: tau, or nan where no tau reaches this KL.
    Raises: ValueError on other shapes. Differs from the paper: derived here; the paper fixes tau and leaves the KL free.

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
    """log pi* in the limit tau -> 0: the reference restricted to the best-rewarded responses.

    Args, Raises: as `optimal_value`, without tau. Returns: [B, M], -inf for what earns less than the best.

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


def frontier_curve(log_b, rewards):
    """KL and reward of the optimum for every prompt, from no KL to the limit tau -> 0: the frontier, to draw or to resample.

    Args: log_b, rewards [B, N], as `frontier`. Returns: kl, reward [G, B], rising along G; average over B for the curve.
    Raises: ValueError on other shapes.

    >>> kl, reward = frontier_curve(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    >>> kl[0].item() < 1e-6, round(kl[-1].item(), 4), reward[-1].item()   # at the end log 2 nats, and the best reward
    (True, 0.6931, 1.0)
    """
    scale = (rewards.max() - rewards.min()).clamp_min(1e-12)
    taus = scale * torch.logspace(3, -3, 121, dtype=rewards.dtype)
    optima = [optimal_logps(log_b, rewards, tau.item()) for tau in taus] + [greedy_logps(log_b, rewards)]
    return (
        torch.stack([kl_divergence(optimum, log_b) for optimum in optima]),
        torch.stack([(optimum.exp() * rewards).sum(-1) for optimum in optima]),
    )


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
    grid_kl, grid_reward = frontier_curve(log_b, rewards)
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
