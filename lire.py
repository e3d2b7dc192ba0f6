"""LIRE: listwise reward enhancement (Zhu et al., Findings of ACL 2024, arXiv 2405.13516).

M responses y_1 .. y_M of a prompt x have log-probabilities s_j = log pi(y_j | x) under the policy and rewards r_j:

    P_j  = exp(s_j / T) / sum_m exp(s_m / T)         the listwise distribution                     (Eq. 4)
    loss = - sum_j P_j R_j                           the expected reward of the list, negated      (Eq. 5)
    R    = softmax(r)                                what the released code does to the rewards first

No reference model, no pairs, no KL term. Plain functions of tensors: [B, M] is B prompts with M candidates each, `mask`
is True where a candidate is real, and what stands in the other slots (nan included) changes nothing.
"""

import torch


def _check(mask, *tensors):
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask, got {mask.dtype}")
    for t in tensors:
        if t.shape != mask.shape or mask.dim() != 2:
            raise ValueError(
                f"expected [B, M] tensors of one shape, got {tuple(t.shape)} with mask {tuple(mask.shape)}"
            )


def _float(t):
    return (
        t if t.dtype == torch.float64 else t.float()
    )  # half precision and integers are computed in float32


def candidate_probs(logps, mask, temperature):
    """P = softmax(logps / temperature) over the real candidates of each list (Eq. 4, arXiv 2405.13516).

    Args: logps [B, M] in nats; mask [B, M] bool; temperature > 0, large values flatten P.
    Returns: [B, M], 0 where mask is False; each row sums to 1. Raises: ValueError on other shapes or temperature <= 0.
    Differs from the paper: nothing. The released code fixes temperature = 2.

    >>> candidate_probs(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]), 2.0)      # 1 / (1 + e), e / (1 + e)
    tensor([[0.2689, 0.7311]])
    """
    _check(mask, logps)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return (_float(logps) / temperature).masked_fill(~mask, -torch.inf).softmax(-1)


def transform_rewards(rewards, mask, how):
    """Rewards of a list on a common scale.

    Args: rewards [B, M]; mask [B, M] bool; how: "softmax" (over the list, temperature 1), "zscore" (minus the list's
        mean, over its standard deviation; all 0 where that is 0) or "none".
    Returns: [B, M], 0 where mask is False. Raises: ValueError on other shapes or another `how`.
    Differs from the paper: it uses rewards as they come ("none"); the released code applies "softmax", unannounced.

    >>> transform_rewards(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]), "zscore")
    tensor([[-1.,  1.,  0.]])
    """
    _check(mask, rewards)
    rewards = _float(rewards)
    if how == "softmax":
        return rewards.masked_fill(~mask, -torch.inf).softmax(-1)
    rewards = torch.where(mask, rewards, 0.0)
    if how == "zscore":
        n = mask.sum(-1, keepdim=True)
        centred = torch.where(mask, rewards - rewards.sum(-1, keepdim=True) / n, 0.0)
        deviation = (centred.square().sum(-1, keepdim=True) / n).sqrt()
        top = rewards.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
        unlike = top > rewards.masked_fill(~mask, torch.inf).amin(
            -1, keepdim=True
        )  # rounding leaves equal rewards a tiny deviation
        return torch.where(unlike, centred / deviation.clamp_min(1e-30), 0.0)
    if how != "none":
        raise ValueError(f'how must be "softmax", "zscore" or "none", got {how!r}')
    return rewards


def lire_loss(logps, rewards, mask, temperature):
    """The list's expected reward under the policy, negated: -sum_j P_j R_j (Eq. 5, arXiv 2405.13516).

    Args: logps [B, M] with gradient, sums over tokens (or means: divide by the lengths first); rewards [B, M], used as
        given; mask [B, M] bool; temperature > 0.
    Returns: [B], in units of the reward; take the mean over prompts. Raises: ValueError on other shapes.
    Differs from the paper: nothing; pass `transform_rewards(..., "softmax")` for the released code's rewards. The
        same author's later code also divides by M, which only rescales the learning rate.

    >>> mask = torch.tensor([[True, True]])
    >>> lire_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), mask, 2.0)        # P = 1/2, 1/2
    tensor([-0.5000])
    """
    _check(mask, logps, rewards)
    return -(candidate_probs(logps, mask, temperature) * torch.where(mask, rewards, 0.0)).sum(-1)


def lire_grad(logps, rewards, mask, temperature):
    """The gradient of `lire_loss` in closed form: d loss / d logps_j = -(1/T) P_j (R_j - sum_m P_m R_m).

    A policy gradient whose baseline is the list's own mean. It sums to zero over the list, so some log-probabilities must
    fall; it is zero where all rewards are equal; it vanishes where P is one-hot (a saturated list teaches nothing).

    Args, Raises: as `lire_loss`. Returns: [B, M]. Derived here, not printed in the paper.

    >>> lire_grad(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[True, True]]), 2.0)
    tensor([[-0.1250,  0.1250]])
    """
    _check(mask, logps, rewards)
    P = candidate_probs(logps, mask, temperature)
    R = torch.where(mask, rewards, 0.0)
    return -P * (R - (P * R).sum(-1, keepdim=True)) / temperature


def sft_loss(logps, lengths, rewards, mask):
    """Mean negative log-likelihood per token of the best-rewarded response (the first of them at a tie).

    Added to LIRE with a small weight it is an anchor: loss + sft_weight * sft_loss.

    Args: logps [B, M] sums over tokens; lengths [B, M] tokens, EOS included; rewards [B, M]; mask [B, M] bool.
    Returns: [B], nats per token. Raises: ValueError on other shapes.
    Differs from the paper: the released code (where it is commented out) divides by the padded length.

    >>> sft_loss(torch.tensor([[-6.0, -4.0]]), torch.tensor([[3, 4]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[True, True]]))
    tensor([1.])
    """
    _check(mask, logps, lengths, rewards)
    best = (
        _float(rewards).masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
    )  # [B, 1], the first at a tie
    return -(_float(logps).gather(-1, best) / lengths.gather(-1, best)).squeeze(-1)


def self_enhance(sample, score, evolve, iterate, start):
    """Algorithm 1: sample from the current policy, score, train on the fixed pool; again with the better policy.

    The caller trains one pass (one Iterate step) at every yield. New samples replace the last generated ones; the
    dataset's own responses (`start`) stay in every pool. evolve = 0 trains on `start` alone.

    Args: sample(e) -> [responses, ...], one list a prompt, drawn from the policy as it is at Evolve step e;
        score(lists) -> pool, with one reward model for all; evolve, iterate: numbers of steps; start: lists, one a prompt.
    Yields: (evolve step, iterate step, pool).
    Differs from the paper: nothing in the order; the paper gives no numbers of steps.

    >>> rounds = self_enhance(lambda e: [[f"new {e}"]], lambda lists: lists, evolve=2, iterate=1, start=[["old"]])
    >>> list(rounds)
    [(0, 0, [['old', 'new 0']]), (1, 0, [['old', 'new 1']])]
    """
    for e in range(max(evolve, 1)):
        new = sample(e) if evolve else [[] for _ in start]
        pool = score([own + drawn for own, drawn in zip(start, new)])
        for i in range(iterate):
            yield e, i, pool
