"""Exercise 8 (derive and implement, 40 minutes): DRO's two losses, and a misprint.

DRO learns from responses y to prompts x, with a reward r for each. They come from anywhere, their
distribution is called mu. It makes a residual small, as it is 0 at the optimum (exercise 7):

    L = mean of 1/2 (r - V(x) - tau l)^2,    l = log pi(y|x) - log pi_ref(y|x)
                                                             (DRO, arXiv 2405.19107, Eq. 4)

The policy pi is a network and V another. V follows the gradient of L with the policy held fixed
(Eq. 7). The policy follows the gradient of L with V held fixed (Eq. 8), times 1/tau. The box of
Algorithm 1 prints a loss for each (logps is log pi(y|x)):

    policy   -logps (r - V) + 1/2 l^2       V held fixed
    value    1/2 (r - tau l - V)^2          the policy held fixed

One factor in these two lines is wrong. Find it: differentiate L of one response in logps (l moves
as logps does), multiply by 1/tau, and compare with the derivative of the policy's line. Write
`losses` with the right factor in its place:

    logps, ref_logps [N]   log-probabilities of N responses, sums over tokens
    rewards          [N]   r
    values           [N]   V(x) of each response's prompt
    tau                    > 0

    Returns: (policy losses [N], value losses [N]), one a response, no mean. The gradient of the
    first reaches logps alone, that of the second values alone: what is held fixed is detached, and
    ref_logps and rewards are data.

A worked example. tau = .5, N = 2:
    logps = (-3, -5), ref_logps = (-3.5, -4.2), r = (1, -.5), V = (.2, .1)
    l = (.5, -.8), residuals r - V - tau l = (.55, -.2)
    value losses (.55^2 / 2, .2^2 / 2) = (.1513, .02); the gradient of their mean in V: (-.275, .1)
    policy losses (2.4625, -2.84); the gradient of their mean in logps: (-.275, .1); as printed it
    is (-.15, -.1)

Does it matter? Take one prompt with three responses, pi_ref = (.5, .3, .2), r = (1, 0, -1), and
mu = pi_ref. An exact expectation takes the place of a batch's mean: sum_y mu(y) loss(y). The policy
is the softmax of three logits, V is one number. Start at log pi_ref and V = 0; then step by step

    logits -= rate x gradient of sum_y mu(y) (-log pi(y) (r(y) - V) + coefficient l(y)^2)
    V      -= rate x gradient of sum_y mu(y) 1/2 (r(y) - tau l(y) - V)^2

until nothing moves: that is `end_point(tau, coefficient)`. In float64 1000 steps at rate .5 are
enough where it comes to rest. Does it? Look at V too. Two ends to compare with, tau = .1: with the
right coefficient (1.0000, .0000, .0000), which is pi*; with the coefficient 1/2
(.7547, .1942, .0511). Then run it with both coefficients at tau = .5, 1, 2 and 5, and answer:

    AGREE_AT_TAU      the only tau at which both end at the same policy
    PRINTED_AT_HALF   where 1/2 ends at tau = .5, a string of ENDS
    PRINTED_AT_FIVE   where 1/2 ends at tau = 5, a string of ENDS

    python -m exercises.check 8
"""

from torch import Tensor

ENDS = ("at pi*", "between pi_ref and pi*", "beyond pi*, seen from pi_ref", "nowhere: it diverges")

AGREE_AT_TAU: float | None = None
PRINTED_AT_HALF: str | None = None
PRINTED_AT_FIVE: str | None = None


def losses(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, values: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """The policy's losses [N] and the value's [N]."""
    raise NotImplementedError("exercise 8: DRO's two losses")


def end_point(tau: float, coefficient: float) -> Tensor:
    """pi [3], where the descent above ends; coefficient stands before l^2."""
    raise NotImplementedError("exercise 8: where the descent ends")
