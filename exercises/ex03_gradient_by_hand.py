"""Exercise 3 (derive and implement, 40 minutes): LIRE's gradient, by hand.

An update raises the log-probability of some candidates of a list and lowers that of others. Which,
and how much? The gradient says it. The list is the one of exercise 2, its rewards R are now used as
they are given, without a softmax:

    P_j  = exp(s_j / T) / sum_m exp(s_m / T)          (LIRE, arXiv 2405.13516, Eq. 4)
    loss = - sum_j P_j R_j                            (Eq. 5)

On paper, find d loss / d s_j. Every s_j is in every P_m, so start with the derivative of a softmax:

    d P_m / d s_j = (1/T) P_m (1 - P_j)  for m = j,     - (1/T) P_m P_j  for m other than j

Put it into the sum, take P_j out, and what is left is short. Write that. Autograd is refused here.

    logps   [B, M]   s, in nats
    rewards [B, M]   R, used as given
    mask    [B, M]   bool, at least one True a row; the other slots hold anything, nan too, and
                     their gradient is 0
    temperature      T > 0
    lire_grad returns d loss / d s [B, M], of each list's own loss: no mean over the batch

A worked example. One list, M = 3, the last slot is not real, T = 2:
    s = (0, 2, nan), R = (3, 1, nan),   P = (1, e, 0) / (1 + e) = (0.2689, 0.7311, 0)
    gradient = (-0.1966, 0.1966, 0):    a step against it raises s_1, the better candidate.

Then three questions on what you found. The answers are formulas too:

    mean_score_grad   Some score a response by its mean over its n_j tokens: s_j / n_j stands in
                      Eq. 4 in the place of s_j. What is d loss / d s_j now, s still being the sums?
                      (lengths [B, M] are the n_j; where mask is False they may be 0.)
    largest_grad      Two candidates, rewards somewhere in [0, 1]. How large can |d loss / d s_1|
                      be at a given T, if P and R may be chosen freely?
    lead              Two candidates again, R = (1, 0). The larger s, ahead by some nats, makes P
                      one-sided and the gradient small. At which lead is
                      |d loss / d s_1| = share x largest_grad(T)? 0 < share <= 1.
                      One number to check yours with: lead(0.75, 2.0) = 2 log 3 = 2.1972.

    python -m exercises.check 3
"""

from torch import Tensor


def lire_grad(logps: Tensor, rewards: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """d loss / d logps [B, M], 0 where mask is False."""
    raise NotImplementedError("exercise 3: the gradient")


def mean_score_grad(
    logps: Tensor, lengths: Tensor, rewards: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """d loss / d logps [B, M] where logps / lengths is the score; 0 where mask is False."""
    raise NotImplementedError("exercise 3: the gradient where the score is a mean")


def largest_grad(temperature: float) -> float:
    """The largest |d loss / d s_1| of two candidates with rewards in [0, 1]."""
    raise NotImplementedError("exercise 3: the largest gradient")


def lead(share: float, temperature: float) -> float:
    """|s_1 - s_2| in nats, at which the gradient is this share of the largest one."""
    raise NotImplementedError("exercise 3: the lead")
