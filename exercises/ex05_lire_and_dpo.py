"""Exercise 5 (derive, 30 minutes): what LIRE and DPO do with a pair in the wrong order.

DPO (direct preference optimisation) learns from pairs, which are LIRE's lists of two: w, the better
response, and l, the worse one. Training should make s_w larger than s_l (s = log pi(y | x)). Where
the model has them in the wrong order by many nats, which loss pulls hard, and which lets go?

    LIRE   loss = - P_w R_w - P_l R_l                   (arXiv 2405.13516, Eq. 4 and 5)
           P = softmax of (s_w, s_l) / T,  R = softmax of the raw rewards (r_w, r_l)
    DPO    loss = - log sigmoid(beta (s_w - s_l))       (arXiv 2305.18290, Eq. 7, here with a
                                                        reference that gives both the same)

Both losses depend on s_w - s_l alone, so a small step changes them by

    d loss = - weight (d s_w - d s_l)        so weight = - d loss / d s_w

Find both weights as functions of margin = s_w - s_l, on paper (autograd is refused here). A softmax
of two numbers a, b is (sigmoid(a - b), sigmoid(b - a)), so P_w has only the margin in it, and R_w
only reward_gap = r_w - r_l: R_w - R_l = tanh(reward_gap / 2). sigmoid(z) = 1 / (1 + exp(-z)) has
the derivative sigmoid(z) sigmoid(-z).

    margin      [N]   s_w - s_l in nats, below 0 where the order is wrong
    reward_gap        r_w - r_l > 0;     temperature   T > 0;     beta > 0

A worked example. reward_gap = log 3, T = 3, beta = 1/3, margin = -3 log 3:
    R = (3/4, 1/4), P = (1/4, 3/4), LIRE's weight is 1/32 = 0.03125;   DPO's weight is 1/4

Then, for any positive settings:

    peak     At which margin is LIRE's weight largest, and how large is it there?
    limits   What do both weights tend to, LIRE's and DPO's, as the margin goes to minus infinity?

And LIRE with M candidates and rewards R used as given, as T grows. Its gradient falls like 1/T, so
look at T times the gradient. It tends to something simple, that is older than LIRE: the gradient
of REINFORCE, which raises each sample by its reward less a baseline. The baseline you will see.

    flat_limit   The limit of T (d loss / d s_j) as T goes to infinity: [B, M], from R [B, M]
                 alone, all slots real. (The gradient is exercise 3's. What does P_j tend to?)

    python -m exercises.check 5
"""

from torch import Tensor


def lire_weight(margin: Tensor, reward_gap: float, temperature: float) -> Tensor:
    """LIRE's weight [N]."""
    raise NotImplementedError("exercise 5: LIRE's weight")


def dpo_weight(margin: Tensor, beta: float) -> Tensor:
    """DPO's weight [N]."""
    raise NotImplementedError("exercise 5: DPO's weight")


def peak(reward_gap: float, temperature: float) -> tuple[float, float]:
    """(margin, weight) where LIRE's weight is largest."""
    raise NotImplementedError("exercise 5: where LIRE's weight is largest")


def limits(reward_gap: float, temperature: float, beta: float) -> tuple[float, float]:
    """(LIRE's weight, DPO's weight) as the margin goes to minus infinity."""
    raise NotImplementedError("exercise 5: both weights far below 0")


def flat_limit(rewards: Tensor) -> Tensor:
    """The limit of T times LIRE's gradient [B, M] as T goes to infinity."""
    raise NotImplementedError("exercise 5: LIRE at a large temperature")
