"""What a right answer to exercise 8 does."""

import numpy as np
import torch

from exercises.judge import Property, Wrong, as_array, same
from exercises.oracle import tensors

FORBIDDEN = ("dro", "objectives", "frontier", "train", "harness", "experiments", "tests")


# ------------------------------------------------------------------------------------------- losses


def batch(N, seed):
    """Random logps, ref_logps, rewards and values [N]."""
    rng = np.random.default_rng(seed)
    logps = rng.normal(size=N) * 2 - 6
    return logps, logps + rng.normal(size=N), rng.normal(size=N), rng.normal(size=N)


def parts(logps, ref_logps, rewards, values, tau):
    """l, r - V and the residual."""
    ratios, advantages = logps - ref_logps, rewards - values
    return ratios, advantages, advantages - tau * ratios


def policy_loss(logps, ref_logps, rewards, values, tau):
    ratios, advantages, _ = parts(logps, ref_logps, rewards, values, tau)
    return -logps * advantages + tau / 2 * ratios**2


def value_loss(*case):
    return parts(*case)[2] ** 2 / 2


def wrong_policies(logps, ref_logps, rewards, values, tau):
    ratios, advantages, residuals = parts(logps, ref_logps, rewards, values, tau)
    right, pull = policy_loss(logps, ref_logps, rewards, values, tau), tau / 2 * ratios**2
    printed, whole = -logps * advantages + ratios**2 / 2, -logps * advantages + tau * ratios**2
    over = -logps * advantages + ratios**2 / 2 / tau
    return {
        "the printed 1/2 stands before l^2: Eq. 8 times 1/tau has another number there": printed,
        "tau stands before l^2: the derivative of a square has a factor 2": whole,
        "1/(2 tau) stands before l^2: Eq. 8 has tau^2 l there, and 1/tau takes one tau away": over,
        "Eq. 8 without its factor 1/tau: divide by tau": tau * right,
        "the first term's sign is turned: r above V has to raise logps": logps * advantages + pull,
        "the second term's sign is turned: it holds the policy at pi_ref": (
            -logps * advantages - pull
        ),
        "l is not squared": -logps * advantages + tau / 2 * ratios,
        "tau is squared too: Eq. 4 has tau^2 l^2, and 1/tau takes one of the two away": (
            -logps * advantages + tau**2 / 2 * ratios**2
        ),
        "logps is squared where l belongs: ref_logps is missing": (
            -logps * advantages + tau / 2 * logps**2
        ),
        "l stands before r - V, where logps does in the box: only the gradient is the same": (
            -ratios * advantages + pull
        ),
        "V is missing: r alone weighs logps": -logps * rewards + pull,
        "the residual stands where r - V belongs: tau l is in the loss twice": (
            -logps * residuals + pull
        ),
        "-logps x residual: its gradient is right if the residual is detached, its value is not": (
            -logps * residuals
        ),
        "Eq. 4 over tau: the gradient is right, but the two terms of the box are asked for": (
            residuals**2 / 2 / tau
        ),
        "logps - ref_logps is turned around or added: l is log pi - log pi_ref": (
            -logps * advantages + tau / 2 * (logps + ref_logps) ** 2
        ),
    }


def wrong_values(logps, ref_logps, rewards, values, tau):
    ratios, advantages, residuals = parts(logps, ref_logps, rewards, values, tau)
    return {
        "the factor 1/2 of the square is missing": residuals**2,
        "tau is missing before l": (advantages - ratios) ** 2 / 2,
        "tau/2 stands before l: it belongs to the policy's loss": (
            (advantages - tau / 2 * ratios) ** 2 / 2
        ),
        "tau l is added to r: it is subtracted": (advantages + tau * ratios) ** 2 / 2,
        "tau l is missing: V is not the mean of r, but of r - tau l": advantages**2 / 2,
        "V is added: the residual is what V does not explain": (
            (rewards + values - tau * ratios) ** 2 / 2
        ),
        "the residual is not squared": residuals / 2,
        "tau / 2 stands before the square: it is 1/2, as in Eq. 4": tau / 2 * residuals**2,
    }


def both(result):
    """The two losses that an answer returned."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise Wrong("two tensors, (policy losses, value losses)", result, "return both, as a tuple")
    return result


def not_swapped(policy, *case):
    """Raises: Wrong where the losses of the policy are those of the value."""
    right, other = policy_loss(*case), value_loss(*case)
    got = as_array(policy, right.shape)
    if np.allclose(got, other, atol=1e-5) and not np.allclose(got, right, atol=1e-5):
        raise Wrong(right, got, "the two losses are in the other order: the policy's comes first")


def check_losses(answer, *case):
    policy, value = both(answer.losses(*tensors(*case[:4]), case[4]))
    not_swapped(policy, *case)
    same(policy, policy_loss(*case), wrong_policies(*case))
    same(value, value_loss(*case), wrong_values(*case))


WORKED = [np.array(x) for x in ([-3, -5.0], [-3.5, -4.2], [1, -0.5], [0.2, 0.1])]


def worked_example(answer):
    check_losses(answer, *WORKED, 0.4)
    check_gradients(answer, *WORKED, 0.4, held=False)  # a leak has a property of its own


def odd_sizes(answer):
    for seed, (N, tau) in enumerate([(3, 0.3), (7, 5.0), (1, 2.0)]):
        check_losses(answer, *batch(N, seed), tau)


def gradients_of(losses, given):
    """d mean / d each of what was given, zeros where nothing arrives."""
    found = [None] * len(given)
    if losses.requires_grad:
        found = torch.autograd.grad(losses.mean(), given, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(given, found)]


GIVEN = ("logps", "ref_logps", "rewards", "values")
HELD = {
    "policy": (
        "",
        "the policy's loss reaches ref_logps: the reference is data, detach it",
        "the policy's loss reaches the rewards: they are data, detach them",
        "the policy's loss reaches V, which Eq. 8 holds fixed: detach the values there",
    ),
    "value": (
        "the value's loss reaches logps, and the policy is held fixed in Eq. 7: detach l there",
        "the value's loss reaches ref_logps: the reference is data, detach it",
        "the value's loss reaches the rewards: they are data, detach them",
        "",
    ),
}


def check_gradients(answer, *case, held=True):
    given = [x.requires_grad_() for x in tensors(*case[:4])]
    ratios, advantages, residuals = parts(*case)
    result, slopes = both(answer.losses(*given, case[4])), {}
    not_swapped(result[0], *case)
    for (name, causes), losses in zip(HELD.items(), result):
        as_array(losses, ratios.shape)
        slopes[name] = gradients_of(losses, given)
        for at, cause, slope in zip(GIVEN, causes, slopes[name]):
            if held and cause and slope.abs().max() > 0:
                raise Wrong(f"no gradient at {at}", slope, cause)
    wrong = {
        "no gradient reaches logps: the whole loss is detached": np.zeros_like(ratios),
        "l^2 has no gradient: the policy's own l must not be detached": -advantages / len(ratios),
        "-logps (r - V) has no gradient: logps must not be detached there": (
            case[4] * ratios / len(ratios)
        ),
    }
    unmoved = {"no gradient reaches V: V learns from its own loss": np.zeros_like(ratios)}
    try:
        right = -residuals / len(residuals)
        same(slopes["policy"][0], right, wrong, what="gradient in logps of the mean policy loss")
        same(slopes["value"][3], right, unmoved, what="gradient in V of the mean value loss")
    except Wrong:
        check_losses(answer, *case)  # what is wrong with a value says more than its gradient
        raise


def gradients(answer):
    for seed, (N, tau) in enumerate([(3, 0.3), (5, 2.0)]):
        check_gradients(answer, *batch(N, 10 + seed), tau)


# --------------------------------------------------------------------------- where the descent ends

ENDS = at_the_optimum, between, beyond, nowhere = (
    "at pi*",
    "between pi_ref and pi*",
    "beyond pi*, seen from pi_ref",
    "nowhere: it diverges",
)

MOVING = "look at V in what is printed: it never comes to rest, it grows faster and faster"
WRONG_ENDS = {
    "DERIVED_AT_TWO": {
        between: "so ends a number that is too large: l^2 has 2 l as its derivative",
        beyond: "so ends a number that is too small: the printed 1/2 is one, at tau = 2",
        nowhere: "V comes to rest with the right number; with a far smaller one it never does",
    },
    "PRINTED_AT_HALF": {
        at_the_optimum: "exercise 7 has pi* in closed form: at tau = .5 it is another policy",
        beyond: "compare pi(y) of the best response with pi_ref's and pi*'s, one after the other",
        nowhere: "look at pi and V in what is printed: they come to rest",
    },
    "PRINTED_AT_FIVE": {
        at_the_optimum: MOVING,
        between: MOVING,
        beyond: "it passes pi* and goes on: does V come to rest?",
    },
}


def agreement(answer):
    tau = answer.AGREE_AT_TAU
    if tau is None:
        raise NotImplementedError("exercise 8: where the two numbers agree")
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise Wrong("a number", repr(tau), "AGREE_AT_TAU is a tau, a number")
    if abs(tau - 1) > 1e-6:
        cause = "at this tau the number that you derived is not the printed 1/2"
        raise Wrong("the tau at which both end at the same policy", tau, cause)


def end_of(name):
    def holds(answer):
        given = getattr(answer, name)
        if given is None:
            raise NotImplementedError(f"exercise 8: {name}")
        if given not in ENDS:
            cause = f"{name} is none of the strings in ENDS"
            raise Wrong("a string of ENDS", repr(given), cause)
        if given in WRONG_ENDS[name]:
            raise Wrong("another end", given, WRONG_ENDS[name][given])

    return holds


PROPERTIES = [
    Property("the worked example", 2, worked_example),
    Property("both losses, batches of odd sizes", 2, odd_sizes),
    Property("each gradient reaches its own network alone", 2, gradients),
    Property("where the two numbers before l^2 agree", 1, agreement),
    Property("where the derived one ends, tau = 2", 1, end_of("DERIVED_AT_TWO")),
    Property("where the printed 1/2 ends, tau = .5", 1, end_of("PRINTED_AT_HALF")),
    Property("where the printed 1/2 ends, tau = 5", 1, end_of("PRINTED_AT_FIVE")),
]
