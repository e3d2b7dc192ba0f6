"""Exercise 3 (derive and implement, 30 minutes): LIRE's gradient, by hand.

An update raises the log-probability of some candidates of a list and lowers that of others. Which,
and how much? The gradient says it. The list is the one of exercise 2, its rewards R are now used as
they are given, without a softmax:

    P_j  = exp(s_j / T) / sum_m exp(s_m / T)          (LIRE, arXiv 2405.13516, Eq. 4)
    loss = - sum_j P_j R_j                            (Eq. 5)

On paper, find d loss / d s_j. Every s_j is in every P_m, so start with the derivative of a softmax:

    d P_m / d s_j = (1/T) P_m (1 - P_j)  for m = j,     - (1/T) P_m P_j  for m other than j

Put it into the sum over m: P_j / T is a factor of every term. Take it out, and what is left in the
bracket is short. Write that. Autograd is refused here.

    logps   [B, M]   s, in nats
    rewards [B, M]   R, used as given
    mask    [B, M]   bool, at least one True a row; the other slots hold anything, nan too, and
                     their gradient is 0
    temperature      T > 0
    lire_grad returns d loss / d s [B, M], of each list's own loss: no mean over the batch

A worked example. One list, M = 3, the last slot is not real, T = 2:
    s = (0, 2, nan), R = (3, 1, nan),   P = (1, e, 0) / (1 + e) = (0.2689, 0.7311, 0)
    gradient = (-0.1966, 0.1966, 0):    a step against it raises s_1, the better candidate.

Then three questions on what you found:

    WHY_ZERO          The gradient of a list sums to 0: a step can't raise all of its candidates.
                      Why is that so in every list? One of the strings in REASONS.
    one_hot_grad      P = (1 - rest, rest, 0) and R = (0, 1, 2): the model is almost sure of the
                      worst response, and the best one has no P at all. What is the gradient, three
                      numbers, as a formula in rest and T? One number to check yours with: at
                      rest = 1/2 and T = 1 the first of the three is 1/4. Then, for yourself:
                      which response does a step raise, and what is left at rest = 0, where P is
                      one-hot?
    mean_score_grad   Some score a response by its mean over its n_j tokens: s_j / n_j stands in
                      Eq. 4 in the place of s_j. What is d loss / d s_j now, s still being the sums?
                      (lengths [B, M] are the n_j, at least 1 in every slot. One line: lire_grad
                      of other arguments, and the chain rule.)

    python -m exercises.check 3
"""

from torch import Tensor

REASONS = (
    "the rewards sum to 1",
    "the rewards, less their plain mean, sum to 0",
    "P sums to 1, whatever the s_j are",
    "the loss is at its minimum",
)

WHY_ZERO: str | None = None


def lire_grad(logps: Tensor, rewards: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """d loss / d logps [B, M], 0 where mask is False."""
    raise NotImplementedError("exercise 3: the gradient")


def one_hot_grad(rest: float, temperature: float) -> tuple[float, float, float]:
    """d loss / d s of one list, P = (1 - rest, rest, 0) and R = (0, 1, 2)."""
    raise NotImplementedError("exercise 3: a P that is almost one-hot")


def mean_score_grad(
    logps: Tensor, lengths: Tensor, rewards: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """d loss / d logps [B, M] where logps / lengths is the score; 0 where mask is False."""
    raise NotImplementedError("exercise 3: the gradient where the score is a mean")
