"""What a right answer to exercise 5 does."""

import numpy as np
import torch

from exercises.judge import NO_USUAL, Property, Wrong, by_hand, same, same_number

FORBIDDEN = ("lire", "objectives", "baselines", "train", "harness", "tests")


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def two_sided(z):
    return sigmoid(z) * sigmoid(-z)


def lire(margin, gap, T):
    return two_sided(margin / T) * np.tanh(gap / 2) / T


def dpo(margin, beta):
    return beta * sigmoid(-beta * margin)


def wrong_lire(margin, gap, T):
    """Usual mistakes in LIRE's weight, and the numbers that they give."""
    right, P_w, P_l = lire(margin, gap, T), sigmoid(margin / T), sigmoid(-margin / T)
    pull = np.tanh(gap / 2)
    return {
        "1/T in front is missing: s / T is in P, and the chain rule brings a 1/T out": right * T,
        "P without its T: P_w depends on margin / T": two_sided(margin) * pull / T,
        "T multiplies the margin: it divides it": two_sided(margin * T) * pull / T,
        "raw rewards: R is their softmax, so R_w - R_l is below 1": P_w * P_l * gap / T,
        "R_w alone: P_l rises where P_w falls, so R_l counts too, against it": (
            P_w * P_l * sigmoid(gap) / T
        ),
        "tanh of the whole gap: R_w - R_l = (exp(gap) - 1) / (exp(gap) + 1)": (
            P_w * P_l * np.tanh(gap) / T
        ),
        "the rewards' softmax has T in it: T is of the log-probs alone": (
            P_w * P_l * np.tanh(gap / T / 2) / T
        ),
        "R_w - R_l is missing: with equal rewards there is nothing to learn": P_w * P_l / T,
        "P_l alone is the factor, as in DPO: the derivative of P_w is P_w P_l / T": P_l * pull / T,
        "P_w alone is the factor: the derivative of P_w is P_w P_l / T": P_w * pull / T,
        "the sign is turned: weight = - d loss / d s_w is above 0": -right,
        "the loss, not its derivative": -(P_w - P_l) * pull / 2 - 1 / 2,
    }


def wrong_dpo(margin, beta):
    right = dpo(margin, beta)
    return {
        "beta in front is missing: beta (s_w - s_l) is in the sigmoid, the chain rule brings it"
        " out": right / beta,
        "the margin's sign is turned: the pull must grow where the order is wrong": dpo(
            -margin, beta
        ),
        "beta is missing in the sigmoid": beta * sigmoid(-margin),
        "beta is missing, inside and in front": sigmoid(-margin),
        "the derivative of sigmoid: the loss has a log before it": beta * two_sided(beta * margin),
        "beta divides the margin: it is a factor": beta * sigmoid(-margin / beta),
        "the sign of the whole is turned: weight = - d loss / d s_w is above 0": -right,
        "the loss, not its derivative": np.log1p(np.exp(-beta * margin)),
    }


def margins(seed):
    return np.random.default_rng(seed).normal(size=7) * 4 - 1


def tensor(x):
    return torch.tensor(x, dtype=torch.float32)


def ask(function, *given):
    with by_hand():
        return function(*given)


def two(got, names):
    if not isinstance(got, tuple) or len(got) != 2:
        raise Wrong(f"two numbers, {names}", got, "return both, as a tuple")
    return got


def worked_example(answer):
    gap, margin = np.log(3), np.array([-3 * np.log(3)])
    got = ask(answer.lire_weight, tensor(margin), gap, 3.0)
    same(got, [1 / 32], wrong_lire(margin, gap, 3.0))
    same(ask(answer.dpo_weight, tensor(margin), 1 / 3), [1 / 4], wrong_dpo(margin, 1 / 3))


def lire_weights(answer):
    for seed, (gap, T) in enumerate([(0.7, 2.0), (3.0, 0.5), (1.3, 5.0)]):
        case = margins(seed), gap, T
        same(ask(answer.lire_weight, tensor(case[0]), gap, T), lire(*case), wrong_lire(*case))


def dpo_weights(answer):
    for seed, beta in enumerate([0.1, 0.5, 2.0]):
        margin = margins(10 + seed)
        got = ask(answer.dpo_weight, tensor(margin), beta)
        same(got, dpo(margin, beta), wrong_dpo(margin, beta))


def far_margins(answer):
    far = tensor([-3000.0, 3000.0])
    for name, given, right in (
        ("lire_weight", (far, 1.0, 0.5), [0.0, 0.0]),
        ("dpo_weight", (far, 0.5), [0.5, 0.0]),
    ):
        got = ask(getattr(answer, name), *given)
        if isinstance(got, torch.Tensor) and not got.isfinite().all():
            cause = "exp of thousands is inf, and inf / inf is nan: torch.sigmoid has no such limit"
            raise Wrong(np.array(right), got, f"{name}: {cause}")
        same(got, right)


def peaks(answer):
    for gap, T in ((0.7, 3.0), (3.0, 0.5)):
        where, height = two(ask(answer.peak, gap, T), "(margin, weight)")
        wrong = {
            "that is where the reward gap is: the margin is in P alone, and P_w P_l is largest"
            " elsewhere": gap,
            "the weight does not depend on the sign of the margin": -gap,
            "T changes how wide the peak is, not where it stands": T,
            "far out on either side P_w P_l is almost 0": np.inf,
            "far out on the side of the wrong order P_w P_l is almost 0": -np.inf,
        }
        same_number(where, 0.0, wrong, unknown=LOOK)
        pull = np.tanh(gap / 2)
        wrong = {
            "P_w P_l at its largest is no 1: both can't be 1 at once": pull / T,
            "P_w = P_l = 1/2 there: both are factors, not one": pull / (2 * T),
            "1/T in front is missing": pull / 4,
            "R_w - R_l is missing": 1 / (4 * T),
            "raw rewards: R is their softmax": gap / (4 * T),
        }
        same_number(height, pull / (4 * T), wrong, unknown=LOOK)


LOOK = f"{NO_USUAL}: print your lire_weight at margins from -20 to 20 and look"


def far_limits(answer):
    for gap, T, beta in ((0.7, 2.0, 0.3), (3.0, 0.5, 2.0)):
        pull = np.tanh(gap / 2)
        first, second = two(ask(answer.limits, gap, T, beta), "(LIRE's, DPO's)")
        wrong = {
            "LIRE's: P_l tends to 1, but P_w is a factor too and tends to 0": pull / T,
            "LIRE's: P_w tends to 0 with the margin, so it can't stay at its largest": pull
            / (4 * T),
            "LIRE's and DPO's are in the wrong order": beta,
            "LIRE's: it is bounded, as P_w, P_l and R_w - R_l all are": np.inf,
        }
        same_number(first, 0.0, wrong, unknown=LOOK)
        wrong = {
            "DPO's: beta in front is missing": 1.0,
            "DPO's: the sigmoid of a large positive number is 1; it is the correct order that gives"
            " 0": 0.0,
            "DPO's: 1/2 of beta is its weight at margin 0": beta / 2,
            "DPO's: the loss grows without end, its slope does not": np.inf,
        }
        same_number(second, beta, wrong, unknown=LOOK.replace("lire", "dpo"))


def large_temperatures(answer):
    rng = np.random.default_rng(20)
    for B, M in ((2, 3), (3, 7), (1, 2)):
        R = rng.normal(size=(B, M)) * 3 + 2
        mean = R.mean(-1, keepdims=True)
        right, others = -(R - mean) / M, (R.sum(-1, keepdims=True) - R) / (M - 1)
        softened = np.exp(R - R.max(-1, keepdims=True))
        softened /= softened.sum(-1, keepdims=True)
        wrong = {
            "1/M is missing: it is what P_j tends to": right * M,
            "the sign is turned: the loss is the negative of the expected reward": -right,
            "without the mean: sum_m P_m R_m tends to the list's mean and is subtracted": -R / M,
            "the mean of the others: sum_m P_m R_m has R_j in it as well": (-(R - others) / M),
            "the sum of all rewards is subtracted: each has P_m, 1/M, as a factor": (
                -(R - mean * M) / M
            ),
            "divided by the deviation as well: nothing in the loss does that": (
                right / R.std(-1, keepdims=True)
            ),
            "a softmax over the rewards: here R is used as given": -(softened - 1 / M) / M,
            "the mean over the batch is subtracted, not the list's own": -(R - R.mean(0)) / M,
            "one mean of all lists is subtracted, and each list has its own: mean(-1, keepdim)": (
                -(R - R.mean()) / M
            ),
            "all 0: the gradient tends to 0, but T times it does not": np.zeros_like(R),
        }
        unknown = f"{NO_USUAL}: let T grow in exercise 3's gradient, what does each P_j tend to?"
        same(ask(answer.flat_limit, tensor(R)), right, wrong, unknown=unknown)


PROPERTIES = [
    Property("the worked example", 2, worked_example),
    Property("LIRE's weight", 2, lire_weights),
    Property("DPO's weight", 1, dpo_weights),
    Property(
        "margins of thousands of nats give no nan",
        1,
        far_margins,
        after=("the worked example", "LIRE's weight", "DPO's weight"),
    ),
    Property("where LIRE's weight is largest, and how large", 1, peaks),
    Property("what both tend to, far in the wrong order", 1, far_limits),
    Property("LIRE at a large temperature", 2, large_temperatures),
]
