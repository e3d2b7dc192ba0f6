"""What a right answer to exercise 3 does."""

import numpy as np
import torch

from exercises.judge import NO_USUAL, Property, Wrong, by_hand, not_a, same
from exercises.oracle import softmax, tensors, zeroed

FORBIDDEN = ("lire", "objectives", "baselines", "train", "harness", "tests")


def lists(B, M, seed):
    """Random log-probs, rewards, lengths and a ragged mask; the first list is whole."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, M + 1, size=B)
    sizes[0], sizes[-1] = M, max(2, M // 2)
    mask = rng.permuted(np.arange(M) < sizes[:, None], axis=-1)
    logps, rewards = rng.normal(size=(B, M)) * 3 - 9, rng.normal(size=(B, M)) * 2 + 1
    return logps, rewards, rng.integers(2, 9, size=(B, M)), mask


def total(x):
    return x.sum(-1, keepdims=True)


def gradient(logps, rewards, mask, T, probs=None):
    P, R = softmax(logps / T, mask) if probs is None else probs, zeroed(rewards, mask)
    return -P * (R - total(P * R)) / T


def wrong_gradients(logps, rewards, mask, T):
    """Usual mistakes, and the numbers that they give."""
    right = gradient(logps, rewards, mask, T)
    P, R = softmax(logps / T, mask), zeroed(rewards, mask)
    all_slots = np.ones_like(mask)
    padded = softmax(zeroed(logps, mask) / T, all_slots)
    soft = softmax(rewards, mask)
    middle = total(R) / total(mask)
    return {
        "the sign is turned: the loss is the expected reward's negative": -right,
        "what all candidates share is missing: R_j alone stands behind P_j, but s_j is in the other"
        " P_m too": -P * R / T,
        "the list's mean reward is weighted by P, here every candidate counts the same": (
            zeroed(-P * (R - middle) / T, mask)
        ),
        "the plain mean, and over all M slots: weighted by P is the list's mean reward": (
            -P * (R - R.mean(-1, keepdims=True)) / T
        ),
        "the mean reward of the whole batch is subtracted: each list has its own (dim=-1)": (
            -P * (R - (P * R).sum()) / T
        ),
        "the list's mean reward is added: in the bracket it is subtracted": (
            -P * (R + total(P * R)) / T
        ),
        "P_j is a factor of R_j alone: it stands before the whole bracket": (
            -(P * R - total(P * R)) / T
        ),
        "the list's summed reward is subtracted: each R_m has its P_m as a factor": (
            zeroed(-P * (R - total(R)) / T, mask)
        ),
        "1/T is missing: s / T is in the exponent, and the chain rule brings a 1/T out": right * T,
        "two slips: the sign is turned, and 1/T is missing": -right * T,
        "two slips: the sign is turned, and T stands in front, not 1/T": -right * T * T,
        "T stands in front as a factor: the derivative of s / T is 1/T": right * T * T,
        "P_j before the bracket is missing: a candidate without mass moves nothing": zeroed(
            -(R - total(P * R)) / T, mask
        ),
        "only d P_j / d s_j is there: s_j is in the sum below every other P_m as well": (
            -P * (1 - P) * R / T
        ),
        "P without its T: softmax(s), where softmax(s / T) is asked for": gradient(
            logps, rewards, mask, T, softmax(logps, mask)
        ),
        "P has T as a factor in the exponent: it divides s": gradient(
            logps, rewards, mask, T, softmax(logps * T, mask)
        ),
        "a softmax over the rewards: here R is used as given": gradient(logps, soft, mask, T),
        "P - R, the gradient of a cross-entropy: in LIRE's loss stands P, not log P": zeroed(
            (P - R) / T, mask
        ),
        "P - softmax(R), the gradient of a cross-entropy: in LIRE's loss stands P, not log P": (
            (P - soft) / T
        ),
        "padded slots take part in P as log-prob 0: they need -inf before the softmax": zeroed(
            gradient(logps, rewards, mask, T, padded), mask
        ),
        "the loss, once for each candidate: its derivative is asked for": zeroed(
            -total(P * R), mask
        ),
        "divided by M: the loss is a sum over the list": right / mask.shape[-1],
        "divided by the number of real candidates: the loss is a sum over the list": (
            right / total(mask)
        ),
        "divided by B: each list has a loss of its own": right / len(mask),
    }


def wrong_mean_gradients(logps, lengths, rewards, mask, T):
    by_sums, by_means = (gradient(x, rewards, mask, T) for x in (logps, logps / lengths))
    return {
        "the gradient by the score s / n: asked for is the one by s, which is a factor 1/n more": (
            by_means
        ),
        "n is a factor: d (s / n) / d s is 1/n": by_means * lengths,
        "the means are not in P: s / n stands in Eq. 4 as well": by_sums / lengths,
        "nothing has changed: the score is s / n, in P and in the chain rule": by_sums,
        "the lengths' product with s is in P: it is s / n": (
            gradient(logps * lengths, rewards, mask, T) / lengths
        ),
        "1/n is there twice: d (s / n) / d s is 1/n once": by_means / lengths**2,
        "the sign is turned": -by_means / lengths,
    }


def ask(function, *arrays, T):
    with by_hand():
        return function(*tensors(*arrays), T)


def no_nan(got, right, cause):
    if isinstance(got, torch.Tensor) and not got.isfinite().all():
        raise Wrong(np.asarray(right), got, cause)


def worked_example(answer):
    logps, rewards = np.array([[0, 2, np.nan]]), np.array([[3, 1, np.nan]])
    mask, e = np.array([[True, True, False]]), np.e
    got = ask(answer.lire_grad, logps, rewards, mask, T=2.0)
    # P_1 P_2 (R_1 - R_2) / T
    right = [[-e / (1 + e) ** 2, e / (1 + e) ** 2, 0]]
    no_nan(got, right, NAN)
    same(got, right, wrong_gradients(logps, rewards, mask, 2.0))


NAN = "nan of the slot that is not real gets in: multiplied by 0 it stays nan (masked_fill)"


def gradients(answer):
    for seed, (sizes, T) in enumerate([((2, 3), 2.0), ((3, 7), 0.5), ((5, 2), 5.0), ((2, 5), 1.5)]):
        logps, rewards, _, mask = lists(*sizes, seed)
        got = ask(answer.lire_grad, logps, rewards, mask, T=T)
        same(got, gradient(logps, rewards, mask, T), wrong_gradients(logps, rewards, mask, T))
    alone = np.array([[-3.0, -7.0]]), np.array([[2.0, 1.0]]), np.array([[True, False]])
    got = ask(answer.lire_grad, *alone, T=2.0)
    same(got, [[0.0, 0.0]], wrong_gradients(*alone, 2.0))


def padding(answer):
    logps, rewards, _, mask = lists(3, 5, 20)
    right = gradient(logps, rewards, mask, 2.0)
    for poison in (np.nan, np.inf, -1e9):
        spoilt = [np.where(mask, x, poison) for x in (logps, rewards)]
        got = ask(answer.lire_grad, *spoilt, mask, T=2.0)
        no_nan(got, right, NAN)
        if isinstance(got, torch.Tensor) and got.shape == mask.shape and got.numpy()[~mask].any():
            raise Wrong(right, got, "slots that are not real have a gradient: theirs is 0")
        same(got, right, wrong_gradients(logps, rewards, mask, 2.0))


def large_sums(answer):
    logps = np.array([[-900.0, -902.0, -4000.0], [-5000.0, -5001.0, -5000.0]])
    rewards, mask = np.array([[1.0, 3.0, 5.0]] * 2), np.array([[True] * 3, [True, True, False]])
    right = gradient(logps, rewards, mask, 2.0)
    got = ask(answer.lire_grad, logps, rewards, mask, T=2.0)
    no_nan(got, right, "exp of sums like -900 is 0, and 0 / 0 is nan: torch.softmax avoids it")
    same(got, right, wrong_gradients(logps, rewards, mask, 2.0))


REASONS = plain, average, right_reason, least = (
    "the rewards sum to 1",
    "the rewards, less their plain mean, sum to 0",
    "P sums to 1, whatever the s_j are",
    "the loss is at its minimum",
)
WRONG_REASONS = {
    plain: "in the worked example R = (3, 1) sums to 4, and the gradient to 0 all the same",
    average: "P_j stands before the bracket, and in the mean too. With the plain mean, 2, the P_j "
    "(R_j - 2) of the worked example are (0.2689, -0.7311), and their sum is not 0",
    least: "at a minimum every entry is 0; in the worked example their sum is, and they are not",
}


def why_zero(answer):
    given = answer.WHY_ZERO
    if given is None:
        raise NotImplementedError("exercise 3: why it sums to 0")
    if given not in REASONS:
        cause = "WHY_ZERO is none of the strings in REASONS"
        raise Wrong("a string of REASONS", repr(given), cause)
    if given != right_reason:
        raise Wrong("another reason", given, WRONG_REASONS[given])


def wrong_one_hots(rest, T):
    """Usual mistakes where P = (1 - rest, rest, 0) and R = (0, 1, 2), and what they give."""
    P, R = np.array([1 - rest, rest, 0]), np.array([0.0, 1.0, 2.0])
    right = -P * (R - rest) / T
    return {
        "the best response is raised: but P_3 = 0 stands before its bracket, nothing moves it": (
            -(R - rest) / T
        ),
        "1/T is missing: it stands before the bracket, with P too": right * T,
        "T is a factor: it divides": right * T * T,
        "the sign is turned: a step goes against the gradient, and response 2 is the better one of "
        "the two that have some P": -right,
        "the list's mean is missing: it is rest, and R_1 = 0 lies below it": -P * R / T,
        "the plain mean of R is 1; the list's own, weighted by P, is rest": -P * (R - 1) / T,
        "right for a small rest alone: P_1 = 1 - rest is a factor of both entries": (
            np.array([rest, -rest, 0]) / T
        ),
        "the three are 0 at rest = 0 alone: before that response 2 has some P": np.zeros(3),
        "P - R, the gradient of a cross-entropy: that one is large where a model is sure and wrong,"
        " LIRE's is not": (P - R) / T,
    }


def one_hot(answer):
    for rest, T in ((0.1, 2.0), (0.4, 0.5), (0.0, 2.0)):
        with by_hand():
            got = answer.one_hot_grad(rest, T)
        if isinstance(got, (tuple, list)):
            got = torch.tensor([float(x) for x in got], dtype=torch.float64)
        if not isinstance(got, torch.Tensor) or got.shape != (3,):
            cause = "the gradient has a number for each response, three in a tuple"
            raise Wrong("three numbers", repr(got), not_a("tuple", got) if got is None else cause)
        P = np.array([1 - rest, rest, 0])
        by_hand_at = f"{NO_USUAL}: put P and R of the text into your formula of the gradient"
        right = -P * (np.arange(3) - rest) / T
        same(got, right, wrong_one_hots(rest, T), unknown=by_hand_at)


def mean_scores(answer):
    for seed, (sizes, T) in enumerate([((2, 3), 2.0), ((3, 5), 0.5)]):
        logps, rewards, lengths, mask = lists(*sizes, 30 + seed)
        right = gradient(logps / lengths, rewards, mask, T) / lengths
        case = logps, lengths, rewards, mask
        same(ask(answer.mean_score_grad, *case, T=T), right, wrong_mean_gradients(*case, T))


VALUES = ("the worked example", "the gradient, ragged lists")
PROPERTIES = [
    Property("the worked example", 2, worked_example),
    Property("the gradient, ragged lists", 2, gradients),
    Property("padded slots change nothing", 1, padding, after=VALUES),
    Property("sums of thousands of nats give no nan", 1, large_sums, after=VALUES),
    Property("why it sums to 0", 1, why_zero),
    Property("a P that is one-hot, and one that almost is", 2, one_hot),
    Property("the gradient where the score is a mean", 1, mean_scores, after=VALUES),
]
