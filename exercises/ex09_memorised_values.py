"""Exercise 9 (predict, then run, 30 minutes): a value network that has memorised its prompts.

DRO makes a residual small, for every response y_j of every prompt x (exercise 8; its loss, arXiv
2405.19107, Eq. 4, is half of delta^2):

    delta_j = r_j - V(x) - tau l_j,      l_j = log pi(y_j|x) - log pi_ref(y_j|x)

A log of a run has two numbers about it:

    residual/rms             the root of the mean of delta^2, over all responses
    residual/within_prompt   the root of the mean over prompts of the variance of delta within a
                             prompt: V(x) is the same for all responses of a prompt, so it cancels
                             (both times the root comes last, once for all prompts)

Three runs in your head. In all of them the policy stays what it was, l = 0, so nothing has been
learnt; V alone is trained, for as long as you like, on the same responses again and again.

    single   every prompt has one response, and V can give every prompt a number of its own
    lists    every prompt has eight responses of unlike reward, V again a number a prompt
    seeing   lists again, and a V that is shown the response too: V(x, y_j)

1. Predict, before you write a line: what do the two numbers, of those same responses, do in each?
   Choose from CHOICES. A single response has no variance within its prompt: that is not asked.
   Predictions are not graded for being right; what is true is shown to you after.
2. Write the three functions. B prompts, M responses each:
       rewards, ratios [B, M]; ratios are l; values [B] is V(x), or [B, M] for a V that sees y
3. Run it: give the settings of a run in which V memorises. (Which of the three above is it? V sees
   the prompt alone.) The task "tiny" asks for one to three words that fit a thing, and rewards each
   that does; it has 60 prompts to train on. The checker makes the run, some seconds, and reads
   residual/rms of the training batches, and residual/within_prompt of held-out prompts, each with
   eight new samples of the policy. The first must fall to less than half of what it began with, the
   second must not: so one sees it in a log.

A worked example. One prompt, r = (1, 3), l = (0, 0), tau = 1, V = 2: delta = (-1, 1), rms = 1,
within_prompt = 1. With V = 0: delta = (1, 3), rms = sqrt 5 = 2.236, and within_prompt still 1.

    python -m exercises.check 9
"""

from torch import Tensor

CHOICES = ("falls to 0", "falls, but not to 0", "stays")
PREDICTED = {
    "single: residual/rms": None,
    "lists: residual/rms": None,
    "lists: residual/within_prompt": None,
    "seeing: residual/rms": None,
    "seeing: residual/within_prompt": None,
}


def residual_rms(rewards: Tensor, ratios: Tensor, values: Tensor, tau: float) -> Tensor:
    """residual/rms, a tensor without dimensions."""
    raise NotImplementedError("exercise 9: the residual")


def within_prompt(rewards: Tensor, ratios: Tensor, values: Tensor, tau: float) -> Tensor:
    """residual/within_prompt, a tensor without dimensions; the variance divides by M."""
    raise NotImplementedError("exercise 9: the residual within a prompt")


def memorised_values(rewards: Tensor, ratios: Tensor, tau: float) -> Tensor:
    """The values [B], a number a prompt, for which residual_rms is least."""
    raise NotImplementedError("exercise 9: what V learns by heart")


def settings() -> dict:
    """Of the run, with what holds where it is not set:

    candidates  8      responses a prompt, at least 1
    evolve      1      how often the policy samples anew, 1: once, before it learns; 0: never, the
                       responses are then those that come logged with the task
    steps       120    at most 400; a step reads 16 of the 60 prompts, so 120 read each 32 times
    lr          1e-3   of the policy, > 0: a policy that stays has a tiny one, at most 1e-5
    value_lr    None   of V, > 0; None: the same as lr
    """
    raise NotImplementedError("exercise 9: the settings of a run")
