"""Exercise 4 (predict and run, 30 minutes): when one candidate takes the whole list.

LIRE learns from a list as long as more than one candidate has some P (exercise 3: where one P is 1,
all gradients are 0). P_j = exp(s_j / T) / sum_m exp(s_m / T) (arXiv 2405.13516, Eq. 4), and s_j is
a sum over all tokens of response j, or, as an option, their mean. How large is the largest P of
M = 8 responses? And which response has it?

A small model of s: the log-prob of every token is drawn by itself, from a normal distribution with
mean -2 and standard deviation 1.45 nats, alike for all tokens of all responses. So no response is
better than another: what P prefers here, it prefers by chance or by length. (Real log-probs are
never above 0, and a few drawn ones are: the model is a rough one. Do not clamp them.)

1. Predict, before you write any code. Fill in PREDICTED. Points are for predictions that are made,
   right or wrong; the checker shows them beside the result as soon as your simulation works.
2. Run. Write `scores`, `largest_prob` and `shortest_wins`:

    lengths   [M]      int, tokens of each response
    lists              N, how many lists are drawn
    how                "sum" or "mean", over a response's tokens
    generator          all random numbers come from it (torch.randn(..., generator=generator))
    scores  -> [N, M]  every response of every list with draws of its own (draw as many tokens
                       for all as the longest has, and torch.where leaves the rest out)
    largest_prob  -> the mean over lists of the largest P
    shortest_wins -> the share of lists whose largest P is that of the response of fewest tokens

3. `draw` a picture, with matplotlib: across, the length (5, 20, 50 and 128 tokens, all 8 alike);
   up, the mean largest P of 500 lists, a curve in a colour of its own for each T of 1, 2, 4, 8;
   sums on the left, means on the right. Import matplotlib inside of `draw`: where it is not
   installed, this part is left out. The frame of it is
       figure, (left, right) = plt.subplots(1, 2, sharey=True)    plt: matplotlib.pyplot
       left.plot(lengths, heights)                                a curve; right.plot too
       figure.savefig(path)
   and to look at it, in picture.png:
       python -c "from exercises.ex04_saturation import draw; draw('picture.png')"

A worked example. Scores of two lists, (0, 2) and (6, 5), T = 2: the largest P is e / (1 + e) =
0.7311 in the first and 1 / (1 + exp(-1/2)) = 0.6225 in the second, so the mean is 0.6768. If the
lengths are (9, 5), the second response is the shorter one and wins in one list of two: 0.5. And a
first result, to check your simulation with: 8 responses of 5 tokens, sums, T = 2, have a mean
largest P of about 0.50.

    python -m exercises.check 4
"""

import torch
from torch import Tensor

# In the place of every None, a number between 0 and 1.
PREDICTED = {
    # The mean largest P of 8 responses of 50 tokens each: at T = 1, 2, 4, 8.
    "sum": {1: None, 2: None, 4: None, 8: None},
    "mean": {1: None, 2: None, 4: None, 8: None},
    # 8 responses of 25, 32, 39, 46, 54, 61, 68 and 75 tokens: how often does the shortest win?
    # (At any T: it does not change which P is the largest.)
    "shortest wins": {"sum": None, "mean": None},
}


def scores(lengths: Tensor, lists: int, how: str, generator: torch.Generator) -> Tensor:
    """Simulated scores [N, M]."""
    raise NotImplementedError("exercise 4: the simulated scores")


def largest_prob(scores: Tensor, temperature: float) -> float:
    """The mean over lists of the largest P, from scores [N, M]."""
    raise NotImplementedError("exercise 4: the mean largest P")


def shortest_wins(scores: Tensor, lengths: Tensor) -> float:
    """The share of lists that the shortest response wins, from scores [N, M] and lengths [M]."""
    raise NotImplementedError("exercise 4: how often the shortest response wins")


def draw(path: str) -> None:
    """Write the picture to path, a PNG."""
    raise NotImplementedError("exercise 4: the picture")
