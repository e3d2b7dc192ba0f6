"""What a right answer to exercise 7 does."""

import numpy as np
import torch

from exercises.judge import Property, Wrong, same
from exercises.oracle import tensors

FORBIDDEN = ("dro", "frontier", "objectives", "train", "harness", "tests")


def sets(B, M, seed):
    """Random references [B, M], as logs, and rewards [B, M]."""
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.ones(M), size=B)), rng.normal(size=(B, M)) * 2


def logsumexp(x, axis=-1):
    top = x.max(axis, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(axis, keepdims=True))).squeeze(axis)


def value(ref_logps, rewards, tau):
    return tau * logsumexp(ref_logps + rewards / tau)


def policy(ref_logps, rewards, tau):
    return ref_logps + (rewards - value(ref_logps, rewards, tau)[:, None]) / tau


def wrong_values(ref_logps, rewards, tau):
    ref, M = np.exp(ref_logps), ref_logps.shape[-1]
    right = value(ref_logps, rewards, tau)
    return {
        "the mean reward under the reference: V* is tau log of a mean of exp(r / tau)": (
            ref * rewards
        ).sum(-1),
        "the reference is missing: every response counts the same": tau * logsumexp(rewards / tau),
        "the uniform mean: pi_ref(y|x) is the weight of y": tau
        * (logsumexp(rewards / tau) - np.log(M)),
        "the factor tau before the log is missing": right / tau,
        "r is multiplied by tau: it is divided": tau * logsumexp(ref_logps + rewards * tau),
        "tau divides the reference's log-probs too": tau * logsumexp((ref_logps + rewards) / tau),
        "tau is not used": logsumexp(ref_logps + rewards),
        "the log is missing": tau * (ref * np.exp(rewards / tau)).sum(-1),
        "tau divides the reference's log-probs, and not r: are the two in the wrong order?": tau
        * logsumexp(ref_logps / tau + rewards),
        "the sign is turned": -right,
        "the largest reward: that is V* as tau goes to 0": rewards.max(-1),
    }


NEGATIVE = "nan: a log of a negative number? ref_logps are logs, their exp is pi_ref"


def wrong_policies(ref_logps, rewards, tau):
    right, log_odds = policy(ref_logps, rewards, tau), ref_logps + rewards / tau
    return {
        "not normalised: log pi_ref + r / tau, less V* / tau": log_odds,
        "V* is subtracted, and not divided by tau": log_odds
        - value(ref_logps, rewards, tau)[:, None],
        "the reference is missing: softmax(r / tau)": (
            rewards / tau - logsumexp(rewards / tau)[:, None]
        ),
        "probabilities, where their logs are asked for": np.exp(right),
        "normalised over the batch, not over a prompt's responses": log_odds
        - logsumexp(log_odds, 0)[None],
        "r is multiplied by tau: it is divided": (
            ref_logps + rewards * tau - logsumexp(ref_logps + rewards * tau)[:, None]
        ),
        "tau is not used": policy(ref_logps, rewards, 1.0),
        "tau divides the reference's log-probs, and not r: are the two in the wrong order?": (
            ref_logps / tau + rewards - logsumexp(ref_logps / tau + rewards)[:, None]
        ),
        "tau divides the reference's log-probs too": (
            (ref_logps + rewards) / tau - logsumexp((ref_logps + rewards) / tau)[:, None]
        ),
    }


def worked_example(answer):
    case = np.log([[0.5, 0.3, 0.2]]), np.array([[1.0, 0.0, -1.0]]), 2.0
    root = np.exp(1 / 2)
    total = 0.5 * root + 0.3 + 0.2 / root
    got = answer.optimal_value(*tensors(*case[:2]), 2.0)
    same(got, [2 * np.log(total)], wrong_values(*case), odd=NEGATIVE)
    right = np.log([[0.5 * root, 0.3, 0.2 / root]]) - np.log(total)
    same(answer.optimal_logps(*tensors(*case[:2]), 2.0), right, wrong_policies(*case))


def values(answer):
    for seed, (B, M, tau) in enumerate([(2, 3, 0.5), (3, 7, 5.0), (1, 13, 2.0)]):
        case = (*sets(B, M, seed), tau)
        got = answer.optimal_value(*tensors(*case[:2]), tau)
        same(got, value(*case), wrong_values(*case), odd=NEGATIVE)


def policies(answer):
    for seed, (B, M, tau) in enumerate([(2, 3, 0.5), (3, 7, 5.0), (1, 13, 2.0)]):
        case = (*sets(B, M, 10 + seed), tau)
        same(answer.optimal_logps(*tensors(*case[:2]), tau), policy(*case), wrong_policies(*case))


def log_space(answer):
    case = (*sets(2, 5, 20), 1e-3)
    for name, right in (("optimal_value", value(*case)), ("optimal_logps", policy(*case))):
        got = getattr(answer, name)(*tensors(*case[:2]), 1e-3)
        if isinstance(got, torch.Tensor) and not got.isfinite().all():
            cause = "exp(r / tau) is too large for a float: torch.logsumexp takes the largest out"
            raise Wrong(right, got, cause)
        same(got, right)


def a_shift(answer):
    ref_logps, rewards = sets(3, 5, 30)
    before = value(ref_logps, rewards, 0.7), policy(ref_logps, rewards, 0.7)
    c = np.array([0.3, -2.0, 5.0])
    result = answer.shifted(*tensors(*before, c))
    if not isinstance(result, tuple) or len(result) != 2:
        raise Wrong("two tensors, (V*, log pi*)", result, "return both, as a tuple")
    wrong = {
        "V* is left as it was: it says how much can be had, and c(x) is had on top": before[0],
        "V* falls: what is added to every reward is added to the maximum": before[0] - c,
        "c / tau is added: V* is in units of the reward": before[0] + c / 0.7,
        "c * tau is added: V* is in units of the reward": before[0] + c * 0.7,
    }
    same(result[0], before[0] + c, wrong)
    wrong = {
        "log pi* moves by c: but V* moves by c too, and only r - V* counts": before[1] + c[:, None],
        "log pi* falls by c: its rows would no longer sum to 1": before[1] - c[:, None],
        "log pi* falls by c / tau, as V* grows: but r grows by c as well": (
            before[1] - c[:, None] / 0.7
        ),
    }
    same(result[1], before[1], wrong)


def a_scale(answer):
    ref_logps, rewards = sets(2, 5, 40)
    tau, k = 0.7, 3.0
    other = answer.equivalent_tau(tau, k)
    wrong = {
        "tau / factor: with rewards that are larger by it the penalty has to grow too": tau / k,
        "tau itself: r / tau would become factor x r / tau": tau,
        "the factor alone: that is right for tau = 1": k,
        "tau + factor: it is r / tau that has to stay": tau + k,
    }
    same(torch.as_tensor(float(other)), k * tau, wrong)
    before = value(ref_logps, rewards, tau)
    wrong = {
        "V* is left as it was: it is in units of the reward": before,
        "V* is divided by the factor: the maximum grows as the rewards do": before / k,
        "the factor is added: V* is multiplied by it": before + k,
        "the tau's factor is in it twice": k**2 * before,
    }
    same(answer.scaled_value(*tensors(before), k), k * before, wrong)


VALUES = ("the worked example", "V* on sets of odd sizes", "pi* on sets of odd sizes")
PROPERTIES = [
    Property("the worked example", 2, worked_example),
    Property("V* on sets of odd sizes", 2, values),
    Property("pi* on sets of odd sizes", 2, policies, after=("V* on sets of odd sizes",)),
    Property("a tau of 0.001 gives no inf", 1, log_space, after=VALUES),
    Property("c(x) added to the rewards", 2, a_shift),
    Property("rewards multiplied by a factor", 1, a_scale),
]
