"""Exercise 10 (open, 30 minutes and more): a pool that teaches nothing.

LIRE learns in rounds (arXiv 2405.13516, Algorithm 1): sample M candidates of every prompt, reward
them, train on the lists. A list whose candidates are all alike, or all earn the same, has gradient
0 (exercise 3). Here is a run that ends so: the settings START, and 120 updates of a small GPT,
shared among the rounds. The task "tiny" asks for one to three words that fit a thing: 1 for each
that does, -1/2 for every other word. The rounds of the run with seed 2:

    round            1     2     3     4     5     6
    different      80 %  40 %  38 %  32 %  31 %  31 %    of a list's candidates
    tied lists     12 %  52 %  72 %  80 %  82 %  82 %    lists of one single reward

Efficiency is the gain in reward over the reference, as a share of the gain of that policy which
earns most at the same KL from the reference. These settings have 26 % (mean of seeds 0, 1 and 2).

1. Measure: write `different` and `tied`.
       lists    [[ids, ...], ...]   the candidates of every prompt, each a list of token ids
       rewards  [[r, ...], ...]     their rewards
2. Change it: `settings` gives what to set otherwise than START, out of MAY_SET. Think before you
   try: what makes candidates alike? In the end they may be, once a prompt's best answer is found;
   what makes them so before? The 120 updates stay, however many rounds there are. If you like,
   write a loss of your own in the place of `loss = None`; LIRE's options temperature, sft_weight,
   score and reward_norm are not read then.
       loss(logps [B, M], ref_logps [B, M], rewards [B, M], mask [B, M]) -> [B]
   log-probs are sums over tokens, mask says which candidates are real, and what stands in the other
   slots is nan: it must not reach the loss.
The checker makes your run with three seeds, half a minute or more, and prints its rounds. A mean
efficiency of .35 has two points, .5 two more, and .6 the last two.

A worked example. Two prompts, two candidates each: [[[5, 9], [5, 9]], [[5, 9], [7, 9]]], with
rewards [[1, 1], [1, 1]]. Different: (1/2 + 2/2) / 2 = 75 %. Tied: both lists, 100 %.

    python -m exercises.check 10
"""

START = {
    "candidates": 4,  # M, at most 16
    "sample_temperature": 0.2,  # of the rounds' samples
    "evolve": 6,  # rounds, at most 12
    "iterate": 1,  # passes over the lists of a round
    "temperature": 2.0,  # LIRE's T
    "sft_weight": 0.0,  # of -log pi(best candidate), added: supervised fine-tuning, SFT
    "score": "sum",  # or "mean", per token
    "reward_norm": "softmax",  # or "zscore", "none"
    "lr": 2e-3,
}
MAY_SET = tuple(START)


def different(lists: list[list[list[int]]]) -> float:
    """The share of different candidates in a list, a mean over lists."""
    raise NotImplementedError("exercise 10: how many candidates differ")


def tied(rewards: list[list[float]]) -> float:
    """The share of lists with one single reward."""
    raise NotImplementedError("exercise 10: how many lists are tied")


def settings() -> dict:
    """What is set otherwise than in START."""
    raise NotImplementedError("exercise 10: settings that keep the pool alive")


loss = None  # or a function of your own
