"""Exercise 8 (derive, implement and run, 30 minutes): DRO's two losses, and a misprint.

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
as logps does), multiply by 1/tau, and compare with the derivative of the policy's line: each is a
term in r - V and a term in l. Write `losses` with the right factor in its place:

    logps, ref_logps [N]   log-probabilities of N responses, sums over tokens
    rewards          [N]   r
    values           [N]   V(x) of each response's prompt
    tau                    > 0

    Returns: (policy losses [N], value losses [N]), one a response, no mean. The gradient of the
    first reaches logps alone, that of the second values alone: what is held fixed is detached
    (x.detach()), and ref_logps and rewards are data.

A worked example. tau = .4, N = 2:
    logps = (-3, -5), ref_logps = (-3.5, -4.2), r = (1, -.5), V = (.2, .1)
    l = (.5, -.8), residuals r - V - tau l = (.6, -.28)
    value losses (.6^2 / 2, .28^2 / 2) = (.18, .0392); the gradient of their mean in V: (-.3, .14)
    policy losses (2.45, -2.872); the gradient of their mean in logps: (-.3, .14); as printed it is
    (-.15, -.1)

Does it matter? Take one prompt with three responses, pi_ref = (.5, .3, .2), r = (1, 0, -1), and
mu = pi_ref. The policy is the softmax of three logits, V is one number. They start at log pi_ref
and 0, and step down the two losses. In the place of a batch's mean stands the exact expectation,
sum_y mu(y) loss(y). That is `end_point`, written for you: it takes the number before l^2 and prints
pi and V on the way. Read it, and run it from the folder of the repository:

    python -m exercises.ex08_dro_losses 0.1 0.5      tau, and the number before l^2

Two ends to compare with, tau = .1: the right number ends at (1.0000, .0000, .0000), which is pi*,
and 1/2 at (.7547, .1942, .0511). Now run your number at tau = 2, and 1/2 at .5 and 5. Look at V
too: does it come to rest? Then answer, the last three with strings of ENDS:

    AGREE_AT_TAU      the only tau at which your number and 1/2 end at the same policy
    DERIVED_AT_TWO    where your number ends at tau = 2 (exercise 7's example has its pi*)
    PRINTED_AT_HALF   where 1/2 ends at tau = .5
    PRINTED_AT_FIVE   where 1/2 ends at tau = 5

    python -m exercises.check 8
"""

import sys

import torch
from torch import Tensor

ENDS = ("at pi*", "between pi_ref and pi*", "beyond pi*, seen from pi_ref", "nowhere: it diverges")

AGREE_AT_TAU: float | None = None
DERIVED_AT_TWO: str | None = None
PRINTED_AT_HALF: str | None = None
PRINTED_AT_FIVE: str | None = None


def losses(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, values: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """The policy's losses [N] and the value's [N]."""
    raise NotImplementedError("exercise 8: DRO's two losses")


def end_point(tau: float, coefficient: float) -> Tensor:
    """pi [3] after 1000 steps, with this coefficient before l^2. Every 200 steps are printed."""
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # pi_ref, too
    rewards = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    logits, value = mu.log(), 0.0
    for step in range(1001):
        logps = logits.log_softmax(-1)
        pi, ratios = logps.exp(), logps - mu.log()  # ratios are l
        if step % 200 == 0:
            print(f"step {step:4}   pi {pi[0]:.4f} {pi[1]:.4f} {pi[2]:.4f}   V {value:.4g}")
        # The gradient in logps of the expected policy loss, and through the softmax to the logits.
        slopes = mu * (-(rewards - value) + 2 * coefficient * ratios)
        logits = logits - 0.5 * (slopes - pi * slopes.sum())
        value += 0.5 * (mu * (rewards - tau * ratios - value)).sum().item()
    return pi


if __name__ == "__main__":
    end_point(*map(float, sys.argv[1:3]))
