"""Exercise 2 (implement, 25 minutes): LIRE's listwise distribution and its loss.

A prompt has M candidate responses with log-probabilities s_1 .. s_M (exercise 1) and raw rewards
r_1 .. r_M. LIRE (arXiv 2405.13516) makes a distribution over the candidates of the list, and
maximises the reward that it expects:

    P_j  = exp(s_j / T) / sum_m exp(s_m / T)                                  (Eq. 4)
    loss = - sum_j P_j R_j,     R = softmax(r), as the authors' code has it   (Eq. 5)

Lists are ragged: in a batch of B, the shorter ones are filled up to M. `mask` says which slots are
real. The others can hold anything, nan too, and must not change a thing: their P is 0, and R's
softmax is over the real ones as well.

    logps   [B, M]   s, in nats; the gradient goes here
    rewards [B, M]   r, raw; they must receive no gradient (detach)
    mask    [B, M]   bool, at least one True a row
    temperature      T > 0

    candidate_probs returns P [B, M]; lire_loss returns [B], one loss a list, no mean.

A worked example. One list, M = 3, the last slot is not real, T = 2:
    s = (0, 2, nan), r = (log 3, 0, nan)
    P = (1, e, 0) / (1 + e) = (0.2689, 0.7311, 0)
    R = (3, 1, 0) / 4
    loss = -(0.2689 x 0.75 + 0.7311 x 0.25) = -0.3845

The s are sums over many tokens, -500 is not unusual: exp(-500) is 0 in float32, and 0 / 0 is nan.

    python -m exercises.check 2
"""

from torch import Tensor


def candidate_probs(logps: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """P [B, M] of every list, 0 where mask is False."""
    raise NotImplementedError("exercise 2: the listwise distribution")


def lire_loss(logps: Tensor, rewards: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """-sum_j P_j R_j [B], R = softmax of the raw rewards over the real candidates."""
    raise NotImplementedError("exercise 2: LIRE's loss")
