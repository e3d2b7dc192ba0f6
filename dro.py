"""DRO: direct reward optimisation (Richemond et al. 2024, arXiv 2405.19107), and the optimum that it aims at.

    max_pi  E_pi[r] - tau KL(pi || pi_ref)    is reached by    pi*(y|x) = pi_ref(y|x) exp((r(x, y) - V*(x)) / tau)     (Eq. 2)
    V*(x) = tau log E_{y ~ pi_ref} exp(r(x, y) / tau)

so r - V* - tau log pi*/pi_ref = 0 for every response, and DRO learns policy and value by making that residual small on
responses from anywhere, one reward each (Eq. 4). No pairs, no samples from the policy. DRO is not "distributionally robust
optimisation". Losses take flat tensors [N], one element a response.
frontier.py finds the pi* of a given KL, and says how near to it a policy is.
"""

import torch


def _check(*tensors, form="[B, M]"):
    if any(t.shape != tensors[0].shape or t.dim() != form.count(",") + 1 for t in tensors):
        raise ValueError(
            f"expected {form} tensors of one shape, got {[tuple(t.shape) for t in tensors]}"
        )


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


# -------------------------------------------------------------------------------------------------------- optimum


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
