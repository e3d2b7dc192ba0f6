"""Exercise 7 (implement, 25 minutes): the optimum that every method is measured against.

Which policy earns most reward, if every nat that it moves away from the reference costs tau? (The
reference, pi_ref, is the model that one starts from.)

    maximise over pi:   sum_y pi(y|x) r(x, y) - tau KL(pi || pi_ref)
    KL(pi || pi_ref) = sum_y pi(y|x) log(pi(y|x) / pi_ref(y|x))
    pi*(y|x) = pi_ref(y|x) exp((r(x, y) - V*(x)) / tau)            (DRO, arXiv 2405.19107, Eq. 2)
    V*(x)    = tau log sum_y pi_ref(y|x) exp(r(x, y) / tau)

V* is the number that makes pi* sum to 1, and it is the value of the maximum. Where a prompt has few
possible responses, all M of them can be listed, and both are exact:

    ref_logps [B, M]   log pi_ref(y|x); each row's exp sums to 1
    rewards   [B, M]   r
    tau                > 0, in units of the reward

    optimal_value -> V* [B];   optimal_logps -> log pi* [B, M]

Stay in log space: with tau = 0.01, exp(r / tau) of r = 5 is infinite, log pi* is not.

A worked example. pi_ref = (.5, .3, .2), r = (1, 0, -1), tau = 2:
    exp(r / tau) = (1.6487, 1, .6065)
    sum_y pi_ref exp(r / tau) = .8244 + .3 + .1213 = 1.2457,   V* = 2 log of it = .4393
    pi* = (.8244, .3, .1213) / 1.2457 = (.6618, .2408, .0974)

Then think, without a new sum over responses. What happens to V* and to log pi*

    shifted                       if a number c(x), one a prompt, is added to all its rewards?
    equivalent_tau, scaled_value  if all rewards are multiplied by a factor > 0? Under another tau,
                                  which you give, pi* stays what it was, and V* is a simple
                                  function of the old one.

    python -m exercises.check 7
"""

from torch import Tensor


def optimal_value(ref_logps: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """V* [B]."""
    raise NotImplementedError("exercise 7: the optimal value")


def optimal_logps(ref_logps: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """log pi* [B, M]."""
    raise NotImplementedError("exercise 7: the optimal policy")


def shifted(values: Tensor, logps: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """V* and log pi* of the rewards r + c, from V* [B] and log pi* [B, M] of r; c is [B]."""
    raise NotImplementedError("exercise 7: what a shift of the rewards does")


def equivalent_tau(tau: float, factor: float) -> float:
    """The tau under which the rewards factor x r have the pi* that r have under the given tau."""
    raise NotImplementedError("exercise 7: the other tau")


def scaled_value(values: Tensor, factor: float) -> Tensor:
    """V* [B] of the rewards factor x r under equivalent_tau, from V* of r under the given tau."""
    raise NotImplementedError("exercise 7: what a scale of the rewards does to V*")
