"""LIRE: listwise reward enhancement (Zhu et al., Findings of ACL 2024, arXiv 2405.13516).

M responses y_1 .. y_M of a prompt x have log-probabilities s_j = log pi(y_j | x) under the policy
and rewards r_j:

    P_j  = exp(s_j / T) / sum_m exp(s_m / T)    the listwise distribution                   (Eq. 4)
    loss = - sum_j P_j R_j                      the list's expected reward, negated         (Eq. 5)
    R    = softmax(r)                           what the released code does to the rewards first

No reference model, no pairs, no KL term. Plain functions of tensors: [B, M] is B prompts with M
candidates each, `mask` is True where a candidate is real, and what stands in the other slots (nan
included) changes nothing. A list without candidates gives 0, with gradient 0. No gradient reaches
rewards or lengths. Half precision is computed in float32, which does not repair log-probabilities
that were summed in half precision. Algorithm 1's rounds of sampling are the loop of train.py.
"""

import torch
from torch import Tensor


def _check(mask: Tensor, *tensors: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask, got {mask.dtype}")
    for tensor in tensors:
        if tensor.shape != mask.shape or mask.dim() != 2:
            raise ValueError(
                f"expected [B, M] tensors of one shape, got {tuple(tensor.shape)} "
                f"with mask {tuple(mask.shape)}"
            )


def _float(tensor: Tensor) -> Tensor:
    """Half precision and integers are computed in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over each list's real candidates; 0 elsewhere, also where a list has none."""
    # A row of -inf alone would give nan, in the gradient too.
    padding = torch.where(mask.any(-1, keepdim=True), -torch.inf, 0.0)  # [B, 1]
    return torch.where(mask, scores, padding).softmax(-1).masked_fill(~mask, 0.0)


def candidate_probs(logps: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """P = softmax(logps / temperature) of a list's real candidates (Eq. 4, arXiv 2405.13516).

    Args: logps [B, M] in nats; mask [B, M] bool; temperature > 0, large values flatten P.
    Returns: [B, M], 0 where mask is False; each row sums to 1, or to 0 if nothing in it is real.
    Raises: ValueError on other shapes, a mask that is not bool, temperature <= 0 or nan.
    Differs from the paper: nothing. The released code fixes temperature = 2.

    >>> mask = torch.tensor([[True, True]])
    >>> candidate_probs(torch.tensor([[0.0, 2.0]]), mask, 2.0)  # 1 / (1 + e), e / (1 + e)
    tensor([[0.2689, 0.7311]])
    """
    _check(mask, logps)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _softmax(_float(logps) / temperature, mask)


def transform_rewards(rewards: Tensor, mask: Tensor, how: str) -> Tensor:
    """Rewards of a list on a common scale.

    Args: rewards [B, M]; mask [B, M] bool; how: one of
        "softmax": over the list, temperature 1;
        "zscore": minus the list's mean, over its standard deviation; all 0 where that is 0;
        "none": as they come.
    Returns: [B, M], 0 where mask is False; without gradient.
    Raises: ValueError on other shapes, a mask that is not bool or another `how`.
    Differs from the paper: it uses rewards as they come ("none"); the released code applies
        "softmax" and does not say so.

    >>> rewards, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    >>> transform_rewards(rewards, mask, "zscore")
    tensor([[-1.,  1.,  0.]])
    """
    _check(mask, rewards)
    if how not in ("softmax", "zscore", "none"):
        raise ValueError(f'how must be "softmax", "zscore" or "none", got {how!r}')
    rewards = _float(rewards.detach())
    if how == "softmax":
        return _softmax(rewards, mask)
    rewards = torch.where(mask, rewards, 0.0)
    if how == "none" or mask.shape[-1] == 0:  # no largest of an empty row
        return rewards
    count = mask.sum(-1, keepdim=True).clamp_min(1)  # [B, 1]
    centred = torch.where(mask, rewards - rewards.sum(-1, keepdim=True) / count, 0.0)
    # Squares overflow above 1e19 and lose their digits below 1e-19; the largest is 1 here.
    centred = centred / centred.abs().amax(-1, keepdim=True)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    # Rounding leaves equal rewards a tiny deviation, so the rewards themselves are compared.
    top = rewards.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    bottom = rewards.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    return torch.where(top > bottom, centred / deviation, 0.0)


def lire_loss(logps: Tensor, rewards: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The list's expected reward, negated: -sum_j P_j R_j (Eq. 5, arXiv 2405.13516).

    Args: logps [B, M] with gradient, sums over tokens (or means: divide by the lengths first);
        rewards [B, M], used as given, without gradient; mask [B, M] bool; temperature > 0.
    Returns: [B], in units of the reward; take the mean over prompts.
    Raises: ValueError on other shapes, a mask that is not bool, temperature <= 0 or nan.
    Differs from the paper: nothing; pass `transform_rewards(..., "softmax")` for the released
        code's rewards. The same author's later code also divides by M. With one M for all lists,
        no second term and plain SGD that rescales the learning rate. Ragged lists then weigh
        differently, an SFT term beside the loss weighs M times more, and Adam undoes the division.

    >>> mask = torch.tensor([[True, True]])
    >>> logps, rewards = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> lire_loss(logps, rewards, mask, 2.0)  # P = 1/2, 1/2
    tensor([-0.5000])
    """
    _check(mask, logps, rewards)
    rewards = torch.where(mask, rewards.detach(), 0.0)
    return -(candidate_probs(logps, mask, temperature) * rewards).sum(-1)


def lire_grad(logps: Tensor, rewards: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The gradient of `lire_loss` in closed form.

        d loss / d logps_j = -(1/T) P_j (R_j - sum_m P_m R_m)

    A policy gradient whose baseline is the list's own mean. It sums to zero over the list, so some
    log-probabilities must fall. It is zero where all rewards are equal. It vanishes where P is
    one-hot: a saturated list teaches nothing.

    Args, Raises: as `lire_loss`.
    Returns: [B, M].
    Differs from the paper: derived here.

    >>> mask = torch.tensor([[True, True]])
    >>> lire_grad(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), mask, 2.0)
    tensor([[-0.1250,  0.1250]])
    """
    _check(mask, logps, rewards)
    P = candidate_probs(logps, mask, temperature)
    R = torch.where(mask, rewards.detach(), 0.0)
    return -P * (R - (P * R).sum(-1, keepdim=True)) / temperature


def sft_loss(logps: Tensor, lengths: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of the best-rewarded response (at a tie the first).

    Added to LIRE with a small weight it is an anchor: loss + sft_weight * sft_loss.

    Args: logps [B, M] sums over tokens; lengths [B, M] tokens, EOS included; rewards [B, M];
        mask [B, M] bool. Lengths and rewards get no gradient.
    Returns: [B], nats per token; 0 for a list without candidates.
    Raises: ValueError on other shapes or a mask that is not bool.
    Differs from the paper: the released code (where it is commented out) takes an average that
        counts the prompt's positions too.

    >>> logps, lengths = torch.tensor([[-6.0, -4.0]]), torch.tensor([[3, 4]])
    >>> sft_loss(logps, lengths, torch.tensor([[0.0, 1.0]]), torch.tensor([[True, True]]))
    tensor([1.])
    """
    _check(mask, logps, lengths, rewards)
    logps = torch.where(mask, _float(logps), 0.0)
    if mask.shape[-1] == 0:  # no best of an empty row
        return logps.sum(-1)
    lengths = torch.where(mask, lengths.detach(), 1)
    scores = _float(rewards).masked_fill(~mask, -torch.inf)
    best = scores.argmax(-1, keepdim=True)  # [B, 1], the first at a tie
    return -(logps.gather(-1, best) / lengths.gather(-1, best)).squeeze(-1)
