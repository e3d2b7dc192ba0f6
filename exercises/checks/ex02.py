"""What a right answer to exercise 2 does."""

import numpy as np
import torch

from exercises.judge import Property, Wrong, gradient_of, same
from exercises.oracle import softmax, tensors, zeroed

FORBIDDEN = ("lire", "objectives", "baselines", "train", "harness", "tests")


def lists(B, M, seed):
    """Random log-probs, rewards and a ragged mask; the first list is whole."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, M + 1, size=B)
    sizes[0], sizes[-1] = M, max(1, M // 2)
    mask = np.arange(M) < sizes[:, None]
    return rng.normal(size=(B, M)) * 3 - 9, rng.normal(size=(B, M)) * 2, rng.permuted(mask, axis=-1)


def probs(logps, mask, T):
    return softmax(logps / T, mask)


def loss(logps, rewards, mask, T):
    return -np.where(mask, probs(logps, mask, T) * softmax(rewards, mask), 0).sum(-1)


def wrong_probs(logps, mask, T):
    """Usual mistakes in P, and the numbers that they give."""
    padded = softmax(zeroed(logps, mask) / T)
    batch = softmax(np.where(mask, logps, -np.inf) / T, axis=0)
    junk = softmax(logps / T)
    shares = zeroed(logps / zeroed(logps, mask).sum(-1, keepdims=True), mask)
    return {
        "T multiplies the log-probs: it divides them": softmax(logps * T, mask),
        "T is not used": softmax(logps, mask),
        "the softmax goes over the batch, not over the candidates of a list": batch,
        "padded slots take part as log-prob 0: they need -inf before the softmax": padded,
        "padded slots are zeroed after the softmax: P no longer sums to 1": zeroed(padded, mask),
        "padded slots take part, with whatever they hold: they need -inf before the softmax": junk,
        "padded slots are zeroed after the softmax, and what they hold is in its sum: they"
        " need -inf before it": zeroed(junk, mask),
        "log P, not P": np.log(probs(logps, mask, T)),
        "exp(s / T) without its sum over the list below it": zeroed(np.exp(logps / T), mask),
        "s divided by its sum, without exp": shares,
    }


def wrong_losses(logps, rewards, mask, T):
    """Usual mistakes in the loss, and the numbers that they give."""
    P, R = probs(logps, mask, T), softmax(rewards, mask)
    padded, divided = softmax(zeroed(rewards, mask)), softmax(rewards / T, mask)
    junk = softmax(rewards)
    cross_entropy = R * np.log(np.where(mask, P, 1))
    right = loss(logps, rewards, mask, T)
    wrong = {
        "the sign is turned: the loss is what goes down": -right,
        "raw rewards: R is their softmax over the list": -zeroed(P * rewards, mask).sum(-1),
        "R's softmax counts padded slots as reward 0": -zeroed(P * padded, mask).sum(-1),
        "R's softmax counts the padded slots, whatever they hold: they need -inf before it": (
            -zeroed(P * junk, mask).sum(-1)
        ),
        "R is divided by T as well: T is of the log-probs alone": -(P * divided).sum(-1),
        "-sum R log P, a cross-entropy (ListNet): LIRE takes P": -cross_entropy.sum(-1),
        "s in the place of P: the softmax of Eq. 4 is missing": -zeroed(R * logps, mask).sum(-1),
        "logps and rewards stand in each other's place": loss(rewards, logps, mask, T),
        "the mean over M, where the sum is asked for": right / mask.shape[-1],
        "the mean over the real candidates, where the sum is asked for": right / mask.sum(-1),
    }
    for cause, own in wrong_probs(logps, mask, T).items():
        wrong[f"P is wrong: {cause}"] = -zeroed(own * R, mask).sum(-1)
    return wrong


def ask_probs(answer, logps, mask, T):
    return answer.candidate_probs(*tensors(logps, mask), T)


def ask_loss(answer, logps, rewards, mask, T):
    return answer.lire_loss(*tensors(logps, rewards, mask), T)


def worked_example(answer):
    logps, rewards = np.array([[0, 2, np.nan]]), np.array([[np.log(3), 0, np.nan]])
    mask, e = np.array([[True, True, False]]), np.e
    P = [[1 / (1 + e), e / (1 + e), 0]]
    same(ask_probs(answer, logps, mask, 2.0), P, wrong_probs(logps, mask, 2.0), odd=NAN)
    right = [-(3 + e) / 4 / (1 + e)]
    got = ask_loss(answer, logps, rewards, mask, 2.0)
    same(got, right, wrong_losses(logps, rewards, mask, 2.0), odd=NAN)


NAN = "nan from a padded slot gets in: masked_fill before the softmax, as nan times 0 stays nan"


def distribution(answer):
    for seed, (sizes, T) in enumerate([((2, 3), 2.0), ((3, 7), 0.5), ((5, 2), 11.0)]):
        logps, _, mask = lists(*sizes, seed)
        same(ask_probs(answer, logps, mask, T), probs(logps, mask, T), wrong_probs(logps, mask, T))


def losses(answer):
    for seed, (sizes, T) in enumerate([((2, 3), 2.0), ((3, 7), 0.5), ((7, 5), 11.0)]):
        logps, rewards, mask = lists(*sizes, 10 + seed)
        case = logps, rewards, mask, T
        same(ask_loss(answer, *case), loss(*case), wrong_losses(*case))


def padding(answer):
    logps, rewards, mask = lists(3, 5, 20)
    right = loss(logps, rewards, mask, 2.0)
    for poison in (np.nan, np.inf, -1e9):
        spoilt = [np.where(mask, x, poison) for x in (logps, rewards)]
        got = ask_loss(answer, *spoilt, mask, 2.0)
        if isinstance(got, torch.Tensor) and got.isnan().any():
            raise Wrong(right, got, NAN)
        same(got, right, wrong_losses(logps, rewards, mask, 2.0))


def large_sums(answer):
    logps = np.array([[-900.0, -902.0, -4000.0], [-5000.0, -5000.0, -5000.0]])
    mask = np.array([[True, True, True], [True, True, False]])
    got = ask_probs(answer, logps, mask, 2.0)
    if isinstance(got, torch.Tensor) and not got.isfinite().all():
        cause = "exp of sums like -900 is 0, and 0 / 0 is nan: torch.softmax takes the largest out"
        raise Wrong(probs(logps, mask, 2.0), got, cause)
    low = "padded slots take part: no finite number lies below all sums of log-probs, only -inf"
    wrong = {low: softmax(zeroed(logps, mask) / 2)} | wrong_probs(logps, mask, 2.0)
    same(got, probs(logps, mask, 2.0), wrong)


def gradients(answer):
    logps, rewards, mask = lists(2, 3, 30)
    at, raw, real = tensors(logps, rewards, mask)
    got = gradient_of(lambda x: answer.lire_loss(x, raw, real, 2.0), at)
    P, R = probs(logps, mask, 2.0), softmax(rewards, mask)
    right = zeroed(-P * (R - zeroed(P * R, mask).sum(-1, keepdims=True)) / 2.0, mask)
    same(torch.tensor(got), right)
    raw.requires_grad_()
    result = answer.lire_loss(at.requires_grad_(), raw, real, 2.0).sum()
    (leak,) = torch.autograd.grad(result, raw, allow_unused=True)
    if leak is not None and leak.abs().max() > 0:
        raise Wrong("no gradient at the rewards", leak, "the rewards are data: rewards.detach()")


DISTRIBUTION, LOSS = "the listwise distribution, ragged lists", "the loss, ragged lists"
PROPERTIES = [
    Property("the worked example", 2, worked_example),
    Property(DISTRIBUTION, 2, distribution),
    Property(LOSS, 2, losses, after=(DISTRIBUTION,)),
    Property("padded slots change nothing", 2, padding, after=(DISTRIBUTION, LOSS)),
    Property("sums of thousands of nats give no nan", 1, large_sums, after=(DISTRIBUTION,)),
    Property(
        "the gradient reaches the log-probs and not the rewards",
        1,
        gradients,
        after=(DISTRIBUTION, LOSS),
    ),
]
