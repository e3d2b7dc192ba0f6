"""DRO: direct reward optimisation (Richemond et al. 2024, arXiv 2405.19107), and its optimum.

    max_pi  E_pi[r] - tau KL(pi || pi_ref)    is reached by                                 (Eq. 2)
    pi*(y|x) = pi_ref(y|x) exp((r(x, y) - V*(x)) / tau)
    V*(x)    = tau log E_{y ~ pi_ref} exp(r(x, y) / tau)

So r - V* - tau log pi*/pi_ref = 0 for every response. DRO learns policy and value by making that
residual small on responses from anywhere that cover what pi_ref can say, one reward each (Eq. 4).
No pairs, no samples from the policy. pi* is what DPO starts from too, with beta for tau. DRO is not
"distributionally robust optimisation". Losses take flat tensors [N], one element a response; no
gradient of theirs reaches ref_logps or rewards. They compute half precision in float32, which does
not repair log-probabilities that were summed in half precision. frontier.py finds the pi* of a
given KL, and says how near to it a policy is.
"""

import torch
from torch import Tensor


def _check(*tensors: Tensor, form: str = "[B, M]") -> None:
    first, dims = tensors[0], form.count(",") + 1
    if any(tensor.shape != first.shape or tensor.dim() != dims for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"expected {form} tensors of one shape, got {shapes}")


def _flat(tau: float, *tensors: Tensor) -> list[Tensor]:
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    _check(*tensors, form="[N]")
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


# ------------------------------------------------------------------------------------------- losses


def dro_loss(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, values: Tensor, tau: float
) -> Tensor:
    """The squared residual, one loss for policy and value (Eq. 4, arXiv 2405.19107).

        1/2 (r - V - tau (logps - ref_logps))^2

    Zero for every response if and only if the policy is pi* and V is V* (where the data cover what
    pi_ref can say).

    Args: logps, ref_logps [N], sums over tokens, nats; rewards [N]; values [N], V(x) of each
        response's prompt; tau > 0. Only logps and values get a gradient.
    Returns: [N], squared units of the reward.
    Raises: ValueError on other shapes, tau <= 0 or nan.
    Differs from the paper: nothing.

    >>> logps, ref_logps = torch.tensor([-3.0]), torch.tensor([-3.5])
    >>> rewards, values = torch.tensor([1.0]), torch.tensor([0.2])
    >>> dro_loss(logps, ref_logps, rewards, values, 0.5)  # residual 1 - 0.2 - 0.5 x 0.5 = 0.55
    tensor([0.1513])
    """
    ref_logps, rewards = ref_logps.detach(), rewards.detach()
    logps, ref_logps, rewards, values = _flat(tau, logps, ref_logps, rewards, values)
    return 0.5 * (rewards - values - tau * (logps - ref_logps)).square()


def dro_v_losses(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, values: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """DRO-V, Algorithm 1: a loss for the policy, one for the value (Eqs. 7, 8, arXiv 2405.19107).

        policy  -logps (r - V) + tau/2 (logps - ref_logps)^2
        value   1/2 (r - tau (logps - ref_logps) - V)^2

    The policy's gradient is that of `dro_loss` over tau, with V held fixed; the value's is that of
    `dro_loss`, with the policy held fixed. Each loss is blind to the other's gradient.

    Args, Raises: as `dro_loss`.
    Returns: policy losses [N], value losses [N]; add their means (two networks), or step apart.
    Differs from the paper: the box of Algorithm 1 prints 1/2 where Eq. 8 over tau gives tau/2. The
        two agree at tau = 1 only; with 1/2 the policy ends elsewhere or diverges
        (`python -m experiments.exact` shows both).

    >>> logps, ref_logps = torch.tensor([-3.0]), torch.tensor([-3.5])
    >>> rewards, values = torch.tensor([1.0]), torch.tensor([0.2])
    >>> # by hand: 3 x 0.8 + 0.25 x 0.25 and 1/2 (1 - 0.25 - 0.2)^2
    >>> dro_v_losses(logps, ref_logps, rewards, values, 0.5)
    (tensor([2.4625]), tensor([0.1513]))
    """
    ref_logps, rewards = ref_logps.detach(), rewards.detach()
    logps, ref_logps, rewards, values = _flat(tau, logps, ref_logps, rewards, values)
    ratios = logps - ref_logps
    policy = -logps * (rewards - values.detach()) + tau / 2 * ratios.square()
    return policy, 0.5 * (rewards - tau * ratios.detach() - values).square()


def dro_p_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """DRO-P: no value network, the batch's mean stands for it (Appendix B, arXiv 2405.19107).

        1/2 Var_batch(r - tau (logps - ref_logps))

    The variance mixes prompts, so the optimum is pi* only if V* is the same for all of them; else
    it is biased.

    Args, Raises: as `dro_loss`, without values.
    Returns: a scalar (half the biased variance; 0 for one response or none).
    Differs from the paper: the printed update lacks the centring of r and has tau for tau/2; its
        two-sample loss needs 1/4.

    >>> logps, ref_logps = torch.tensor([-3.0, -5.0]), torch.tensor([-3.5, -4.2])
    >>> rewards = torch.tensor([1.0, -0.5])
    >>> dro_p_loss(logps, ref_logps, rewards, 0.5)  # r - tau l = 0.75, -0.1: 1/2 x 0.425^2
    tensor(0.0903)
    """
    logps, ref_logps, rewards = _flat(tau, logps, ref_logps.detach(), rewards.detach())
    residuals = rewards - tau * (logps - ref_logps)
    return 0.5 * residuals.var(correction=0) if len(residuals) else residuals.sum()


# ------------------------------------------------------------------------------------------ optimum


def optimal_value(ref_logps: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """V*(x) of an enumerated set of responses (Eq. 2, arXiv 2405.19107).

        V*(x) = tau log sum_j exp(ref_logps_j + r_j / tau)

    Args: ref_logps [B, M], log-probabilities that sum to 1 over the set; rewards [B, M]; tau > 0,
        in units of the reward.
    Returns: [B], in units of the reward.
    Raises: ValueError on other shapes, no response (M = 0), tau <= 0 or nan.
    Differs from the paper: nothing.

    >>> ref_logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> optimal_value(ref_logps, torch.tensor([[1.0, 0.0, -1.0]]), 1.0)
    tensor([0.5497])
    """
    _check(ref_logps, rewards)
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if ref_logps.shape[-1] == 0:
        raise ValueError(f"expected at least one response, got {tuple(ref_logps.shape)}")
    return tau * (ref_logps + rewards / tau).logsumexp(-1)


def optimal_logps(ref_logps: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """log pi*(y_j|x) = ref_logps_j + (r_j - V*(x)) / tau (Eq. 2, arXiv 2405.19107).

    Args, Raises: as `optimal_value`.
    Returns: [B, M], normalised within each row.
    Differs from the paper: nothing.

    >>> ref_logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> optimal_logps(ref_logps, torch.tensor([[1.0, 0.0, -1.0]]), 1.0).exp()
    tensor([[0.7844, 0.1731, 0.0425]])
    """
    return ref_logps + (rewards - optimal_value(ref_logps, rewards, tau)[:, None]) / tau


def kl_divergence(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(p || q) = sum_j p_j (log p_j - log q_j) of each row, with 0 log 0 = 0.

    Args: logps, ref_logps [B, M], log p and log q.
    Returns: [B], nats.
    Raises: ValueError on other shapes.

    >>> sure, even = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> kl_divergence(sure, even)  # log 2
    tensor([0.6931])
    """
    _check(logps, ref_logps)
    probs = logps.exp()
    return torch.where(probs > 0, probs * (logps - ref_logps), 0.0).sum(-1)
