"""Exercise 6 (find the bug, 30 minutes): six short programs that run and are wrong.

A mistake in an alignment loss seldom stops a program. The loss falls, the reward rises a little,
and the numbers are not those of the paper. Each of the programs A to F has one such bug, in one
line. Each docstring is true: it says what the program should compute. For every program

    mend it    change the line that is wrong; name, parameters and result stay as they are
    name it    set BUG_A ... BUG_F to the bug that it was, a string of NAMES: six of them are right

There are points for both together, and none for one of the two.
Then answer the question about program C, below it. All programs share these shapes:

    ids         [B, T]      B texts of T tokens: prompt, response, padding; the last token of the
                            response is its end token (EOS), and it counts as one of its tokens
    logits      [B, T, V]   logits[b, t] predicts the token ids[b, t + 1]
    token_logps [B, T]      log-prob of the token ids[b, t], given the tokens before it
    mask        [B, T]      bool, True on the response's tokens

The log-probability of a response is the sum over its tokens, and l = log pi(y|x) - log pi_ref(y|x)
compares policy and reference. DPO takes l of two responses to one prompt, DRO of single ones:

    DPO   -log sigmoid(beta (l(better) - l(worse)))     (arXiv 2305.18290, Eq. 7)
    DRO   1/2 (r - V(x) - tau l)^2                      (arXiv 2405.19107, Eq. 4)

A worked example, a program that should give log pi(y|x) [B]; starts [B] is the place of each
response's first token:

    place = torch.arange(token_logps.shape[1])
    return torch.where(place > starts[:, None], token_logps, 0.0).sum(-1)

For token_logps = (-3, -1, -2, -4) and starts = 1 it returns -6; by hand it is -1 - 2 - 4 = -7. Now
change one input at a time: with -100 in the place of -1 it is still -6. So this token, the first of
the response, does not count: `>` has to be `>=`, the bug is "first response token dropped". That is
the way to all six: a small input, the result by hand, and then look at which inputs matter (A, B
and C), at what became of the inputs (D), at a second call (E), and at shapes (F).

    python -m exercises.check 6
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

EOS = 0  # the end token's id

NAMES = (
    "EOS dropped",
    "first response token dropped",
    "prompt in the sum",
    "padding in the sum",
    "padded length divides",
    "labels changed in place",
    "logits read one place late",
    "dropout on",
    "half precision",
    "[B] against [B, 1]",
    "gradient into the reference",
    "sign turned",
)

BUG_A: str | None = None
BUG_B: str | None = None
BUG_C: str | None = None
BUG_D: str | None = None
BUG_E: str | None = None
BUG_F: str | None = None


def program_a(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Supervised fine-tuning's loss, a scalar: the mean of -log-prob over all response tokens."""
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)  # cross_entropy gives 0 where -100 stands
    scores = logits[:, :-1].flatten(0, 1)  # [B * (T - 1), V]
    losses = cross_entropy(scores, targets.flatten(), reduction="none")
    return losses.mean()


def program_b(token_logps: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
    """log pi(y|x) [B]. The padding is EOS too, as often; no prompt contains it.

    starts [B] is the place of each response's first token. A response that was cut off has no EOS,
    and it ends with the row. (cumsum(-1) of ids == EOS counts those up to each place.)
    """
    place = torch.arange(ids.shape[1])  # [T]
    begun = place >= starts[:, None]
    mask = begun & (ids != EOS)
    return torch.where(mask, token_logps, 0.0).sum(-1)


def program_c(
    token_logps: Tensor, ref_token_logps: Tensor, prompt_lengths: Tensor, lengths: Tensor
) -> Tensor:
    """l [B]. lengths [B] counts the tokens of prompt and response, EOS included."""
    place = torch.arange(token_logps.shape[1])  # [T]
    mask = place < lengths[:, None]
    differences = token_logps - ref_token_logps
    return torch.where(mask, differences, 0.0).sum(-1)


def bug_changes_loss(objective: str) -> bool:
    """Does the bug of program C change the loss of this objective? It is "dpo" or "dro".

    Both take l from program C. The policy gives the tokens of a prompt another log-prob than the
    reference does.
    """
    raise NotImplementedError("exercise 6: who notices the bug of program C?")


def program_d(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi(y|x) [B]. labels [B, T] are the ids of the response's tokens, -100 at other places."""
    targets = labels[:, 1:]
    targets[targets == -100] = 0  # gather takes no negative index
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    mask = labels[:, 1:] != -100
    return torch.where(mask, token_logps, 0.0).sum(-1)


def program_e(policy: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi_ref(y|x) [B], where pi_ref is the policy as it is now; policy(ids) is token_logps.

    The policy is about to be trained, with dropout: it is in train mode, and stays as it is.
    """
    reference = copy.deepcopy(policy)
    reference.requires_grad_(False)
    with torch.no_grad():
        token_logps = reference(ids)
    return torch.where(mask, token_logps, 0.0).sum(-1)


def program_f(
    head: nn.Linear, states: Tensor, rewards: Tensor, log_ratios: Tensor, tau: float
) -> Tensor:
    """DRO's loss (Eq. 4), a scalar: the mean over B responses. V(x) comes from a linear head.

    head is nn.Linear(D, 1); states [B, D] of the prompts; rewards [B]; log_ratios [B] is l.
    """
    values = head(states)
    targets = rewards - tau * log_ratios
    residuals = targets - values
    return 0.5 * residuals.square().mean()
