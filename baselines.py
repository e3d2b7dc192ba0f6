"""What the two papers compare with. Plain functions of log-probabilities, as in lire.py and dro.py.

    pairs [N]        dpo_loss  ipo_loss  slic_loss              chosen against rejected
    lists [B, M]     plackett_luce_loss  rrhf_loss  pro_loss  rwr_loss    `mask`: which are real
    single [N]       kto_loss                                   desirable or not

RRHF, SLiC and PRO add the likelihood of the best response: lire.sft_loss, weighed where the losses
are put together. A list without candidates gives 0. Gradients reach logps alone: they stop at the
reference, rewards and lengths. Half precision is computed in float32, which can't bring back the
nats that a log-probability lost if its tokens were summed in half precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half precision and integers are computed in float32."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def _check(shape: torch.Size, *tensors: Tensor, dims: int) -> None:
    if len(shape) != dims or any(tensor.shape != shape for tensor in tensors):
        expected = "[N]" if dims == 1 else "[B, M]"
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"expected {expected} tensors of one shape, got {shapes}")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _best_first(mask: Tensor, rewards: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """mask, rewards and tensors [B, M], each list in the order of its rewards, best first.

    Equal rewards keep their order; padding comes last, as 0.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask, got {mask.dtype}")
    _check(mask.shape, mask, rewards, *tensors, dims=2)
    order = rewards.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = (torch.where(mask, tensor, 0) for tensor in (rewards, *tensors))
    return mask.gather(-1, order), *(tensor.gather(-1, order) for tensor in kept)


# -------------------------------------------------------------------------------------------- pairs


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

        -log sigmoid(beta (l_chosen - l_rejected))          l = logps - ref_logps

    Args: four [N] sums over tokens, nats, the reference's two without gradient; beta > 0.
    Returns: [N].
    Raises: ValueError on other shapes, beta <= 0 or nan.
    Differs from the paper: nothing.

    >>> one = lambda x: torch.tensor([x])
    >>> dpo_loss(one(-2.0), one(-5.0), one(-3.0), one(-4.0), 0.5)  # log(1 + exp(-0.5 * 2))
    tensor([0.3133])
    """
    margin = _margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return -F.logsigmoid(beta * margin)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

        (l_chosen - l_rejected - 1 / (2 beta))^2            l = logps - ref_logps

    The paper's tau is beta here.

    Args, Returns, Raises: as `dpo_loss`.
    Differs from the paper: nothing. TRL divides the log-probabilities by the responses' lengths
        first.

    >>> one = lambda x: torch.tensor([x])
    >>> ipo_loss(one(-2.0), one(-5.0), one(-3.0), one(-4.0), 0.5)  # (2 - 1)^2
    tensor([1.])
    """
    margin = _margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return (margin - 1 / (2 * beta)).square()


def _margin(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    _positive("beta", beta)
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check(chosen_logps.shape, *logps, dims=1)
    chosen, rejected, ref_chosen, ref_rejected = _wide(*logps)
    return (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())


def slic_loss(chosen_logps: Tensor, rejected_logps: Tensor, delta: float = 1.0) -> Tensor:
    """Sequence likelihood calibration, its rank loss (Zhao et al. 2023, arXiv 2305.10425, Eq. 1).

        max(0, delta - s_chosen + s_rejected)               s = logps

    No reference model.

    Args: two [N] sums over tokens, nats; delta > 0, the margin.
    Returns: [N].
    Raises: ValueError on other shapes, delta <= 0 or nan.
    Differs from the paper: its second term, lambda times the likelihood of the target, is
        lire.sft_loss of the best response.

    >>> slic_loss(torch.tensor([-2.0, -2.0]), torch.tensor([-2.5, -9.0]))
    tensor([0.5000, 0.0000])
    """
    _positive("delta", delta)
    _check(chosen_logps.shape, chosen_logps, rejected_logps, dims=1)
    chosen, rejected = _wide(chosen_logps, rejected_logps)
    return (delta - chosen + rejected).clamp_min(0)


# -------------------------------------------------------------------------------------------- lists


def plackett_luce_loss(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """DPO for a ranking: the Plackett-Luce likelihood of the order that the rewards give
    (Rafailov et al. 2023, arXiv 2305.18290, Appendix A.3).

        - sum_k [h_k - log sum_{j >= k} exp h_j]            h = beta (logps - ref_logps), best first

    Two responses give DPO; equal rewards are ranked in the order in which they stand.

    Args: logps, ref_logps, rewards [B, M], only the first with gradient; mask [B, M] bool;
        beta > 0.
    Returns: [B].
    Raises: ValueError on other shapes, a mask that is not bool, beta <= 0 or nan.
    Differs from the paper: nothing.

    >>> zeros, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    >>> plackett_luce_loss(zeros, zeros, torch.tensor([[1.0, 3.0, 2.0]]), mask, 0.1)  # log 3!
    tensor([1.7918])
    """
    _positive("beta", beta)
    tensors = _wide(rewards.detach(), logps, ref_logps.detach())
    mask, _, logps, ref_logps = _best_first(mask, *tensors)
    # Padding stands behind the real ones, and is no -inf: that would give nan.
    h = (beta * (logps - ref_logps)).masked_fill(~mask, -1e30)
    rest = h.flip(-1).logcumsumexp(-1).flip(-1)  # log-sum-exp of this and all worse candidates
    return torch.where(mask, rest - h, 0.0).sum(-1)


def rrhf_loss(logps: Tensor, lengths: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Rank responses to align (Yuan et al. 2023, arXiv 2304.05302, Eq. 2).

        sum over pairs with r_i < r_j of max(0, p_i - p_j)  p = logps / lengths

    No reference, no margin.

    Args: logps [B, M] sums over tokens; lengths [B, M] tokens, EOS included; rewards [B, M];
        mask [B, M] bool. Only logps get a gradient.
    Returns: [B].
    Raises: ValueError on other shapes or a mask that is not bool.
    Differs from the paper: its second term, the best response's likelihood (a sum over tokens), is
        lire.sft_loss (their mean).

    >>> logps, lengths = torch.tensor([[-4.0, -9.0]]), torch.tensor([[4, 3]])
    >>> rewards, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[True, True]])
    >>> rrhf_loss(logps, lengths, rewards, mask)  # -1 + 3
    tensor([2.])
    """
    mask, rewards, scores = _scores_best_first(logps, lengths, rewards, mask)
    better = rewards[:, :, None] > rewards[:, None, :]  # [B, better, worse]
    pairs = better & mask[:, :, None] & mask[:, None, :]
    hinge = (scores[:, None, :] - scores[:, :, None]).clamp_min(0)
    return torch.where(pairs, hinge, 0.0).sum((-2, -1))


def pro_loss(logps: Tensor, lengths: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Preference ranking optimisation (Song et al. 2023, arXiv 2306.17492, Eq. 8).

        - sum_k log [exp(t_kk p_k) / (exp(t_kk p_k) + sum_{i > k} exp(t_ki p_i))]
        p = logps / lengths, best first;  t_ki = r_k - r_i;  t_kk = max over i > k of t_ki

    Each response stands against all worse ones.

    Args, Returns, Raises: as `rrhf_loss`.
    Differs from the paper: its second term, 0.05 (M - 1)^2 times the best response's likelihood, is
        lire.sft_loss.

    >>> logps, lengths = torch.tensor([[-4.0, -9.0]]), torch.tensor([[4, 3]])
    >>> rewards, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[True, True]])
    >>> pro_loss(logps, lengths, rewards, mask)  # log(1 + exp(-1 + 3))
    tensor([2.1269])
    """
    mask, rewards, scores = _scores_best_first(logps, lengths, rewards, mask)
    M = mask.shape[-1]
    later = torch.ones(M, M, dtype=torch.bool, device=mask.device).triu(1)  # [k, i]
    later = later & mask[:, None, :] & mask[:, :, None]  # [B, k, i]
    gaps = torch.where(later, rewards[:, :, None] - rewards[:, None, :], 0.0)
    # A gap is never negative, so one more that is 0 changes nothing, and is there where M = 0.
    own = F.pad(gaps, (0, 1)).amax(-1) * scores  # [B, k]
    others = (gaps * scores[:, None, :]).masked_fill(~later, -torch.inf)
    total = torch.cat([own[..., None], others], -1).logsumexp(-1)
    return torch.where(later.any(-1), total - own, 0.0).sum(-1)


def rwr_loss(logps: Tensor, rewards: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Reward-weighted likelihood (Peters and Schaal 2007; Peng et al. 2019, arXiv 1910.00177).

        - sum_j softmax(r / tau)_j logps_j                  over the candidates of one prompt

    With M samples of pi_ref a prompt it is least, in expectation, where pi is

        pi_ref(y) E[M w(y) / (w(y) + sum of the w of M - 1 others)],     w = exp(r / tau)

    because each of the M samples is y with probability pi_ref(y), and then weighs that much. This
    is pi_ref for M = 1 (plain likelihood), never more than M pi_ref, so its KL to the reference is
    at most log M; as M grows the sum of the others nears M E[w], and this nears pi* (dro.py).

    Args: logps, rewards [B, M], the first alone with gradient; mask [B, M] bool; tau > 0.
    Returns: [B].
    Raises: ValueError on other shapes, a mask that is not bool, tau <= 0 or nan.
    Differs from the paper: weights are normalised within the list; there they have a learned
        baseline or a sum over the batch.

    >>> logps, rewards = torch.tensor([[-1.0, -3.0]]), torch.tensor([[0.0, 0.0]])
    >>> rwr_loss(logps, rewards, torch.tensor([[True, True]]), 0.5)
    tensor([2.])
    """
    _positive("tau", tau)
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask, got {mask.dtype}")
    _check(mask.shape, mask, logps, rewards, dims=2)
    logps, rewards = _wide(logps, rewards.detach())
    # The lowest number is not -inf, which would give nan for a list without candidates.
    lowest = torch.finfo(rewards.dtype).min
    weights = (rewards / tau).masked_fill(~mask, lowest).softmax(-1)
    return -(weights * torch.where(mask, logps, 0.0)).sum(-1)


def _scores_best_first(
    logps: Tensor, lengths: Tensor, rewards: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _wide(rewards.detach(), logps, lengths.detach())
    mask, rewards, logps, lengths = _best_first(mask, *tensors)
    return mask, rewards, logps / lengths.clamp_min(1)


# ------------------------------------------------------------------------------------------- single


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    mismatched_logps: Tensor,
    mismatched_ref_logps: Tensor,
    beta: float,
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306), as the DRO paper
    uses it (beta = tau). With l = logps - ref_logps:

        desirable    1 - sigmoid(beta l - z)          undesirable    1 - sigmoid(z - beta l)
        z = beta max(0, mean l of mismatched pairs), without gradient

    A mismatched pair is a prompt with another's response. z estimates beta KL(policy || reference),
    and is 0 where there are no such pairs.

    Args: logps, ref_logps [N], sums over tokens, nats; desirable [N] bool;
        mismatched_logps, mismatched_ref_logps [K]; beta > 0. Only logps get a gradient.
    Returns: [N], in (0, 1).
    Raises: ValueError on other shapes, `desirable` that is not bool, beta <= 0 or nan.
    Differs from the paper: both kinds weigh 1 (--desirable-weight is applied to what is returned),
        as in the DRO paper, which calls desirable what earns more than its batch's mean.

    >>> one = lambda x: torch.tensor([x])
    >>> kto_loss(one(-2.5), one(-3.0), one(True), one(-4.4), one(-4.0), 0.1)  # 1 - sigmoid(0.05)
    tensor([0.4875])
    """
    _positive("beta", beta)
    same = logps.shape == ref_logps.shape == desirable.shape
    if logps.dim() != 1 or not same or desirable.dtype != torch.bool:
        raise ValueError(
            f"expected logps, ref_logps and bool desirable [N], got {tuple(logps.shape)}, "
            f"{tuple(ref_logps.shape)} and {desirable.dtype} {tuple(desirable.shape)}"
        )
    if mismatched_logps.dim() != 1 or mismatched_logps.shape != mismatched_ref_logps.shape:
        raise ValueError(
            f"expected mismatched log-probs [K], got {tuple(mismatched_logps.shape)} "
            f"and {tuple(mismatched_ref_logps.shape)}"
        )
    constants = ref_logps.detach(), mismatched_logps.detach(), mismatched_ref_logps.detach()
    logps, ref_logps, other, other_ref = _wide(logps, *constants)
    z = beta * (other - other_ref).mean().clamp_min(0) if len(other) else 0.0
    margins = beta * (logps - ref_logps) - z
    return 1 - torch.sigmoid(torch.where(desirable, margins, -margins))
