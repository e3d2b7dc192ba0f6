"""What a right answer to exercise 6 does."""

import inspect
import io
import tokenize
import zlib
from functools import partial

import numpy as np
import torch
from torch import nn

from exercises.judge import Property, Wrong
from exercises.judge import same as same_as
from exercises.oracle import tensors, token_logps

FORBIDDEN = (
    *("model", "t5", "data", "train", "harness", "lire", "dro", "baselines", "objectives"),
    *("tests", "transformers", "trl"),
)

# Of every bug, what one would see in a program that has it, and does not see in the others.
SEEN = {
    "EOS dropped": "the log-prob of an end token would have no part in the result",
    "first response token dropped": (
        "the log-prob of a response's first token would have no part in the result"
    ),
    "prompt in the sum": "another log-prob of a prompt's token would change the result",
    "padding in the sum": "another log-prob of a token in the padding would change the result",
    "padded length divides": "longer padding would bring the result nearer to 0",
    "labels changed in place": "a tensor that is given in would come back changed",
    "logits read one place late": "logits[b, t] would be read for the token ids[b, t]",
    "dropout on": "a second call with the same input would give another result",
    "half precision": "only the last digits of the result would be wrong",
    "[B] against [B, 1]": "a tensor [B, B] would arise on the way: print the shapes",
    "gradient into the reference": "the result itself would be right",
    "sign turned": "the result would be right, but for its sign",
}
RIGHT = {
    "A": "padded length divides",
    "B": "EOS dropped",
    "C": "prompt in the sum",
    "D": "labels changed in place",
    "E": "dropout on",
    "F": "[B] against [B, 1]",
}
AS_GIVEN = {  # what is said of the programs as the skeleton has them
    "A": "the padded length divides: all B x (T - 1) places count, those of prompt and padding too",
    "B": "the end token is missing from the sum: padding has its id, so `ids != EOS` drops both",
    "C": "the prompt is in the sum: the mask has an end and no beginning",
    "D": "the mask is True everywhere: labels[:, 1:] is a view, so -100 is gone from labels too",
    "E": "the reference has dropout on: a copy of a model in train mode is in train mode, and "
    "no_grad does not change that",
    "F": "values are [B, 1] and targets [B]: the difference is [B, B], each reward against each V",
}
# Of each program's words in the skeleton, without comments: the skeleton itself is edited.
AS_WRITTEN = {
    "A": 2800740899,
    "B": 380635946,
    "C": 2972629045,
    "D": 2286238357,
    "E": 2365599620,
    "F": 1006183935,
}
UNMOVED = "you changed something, and the result is what it was: the bug is elsewhere"
# These two can be seen in program D, and are a consequence.
CONSEQUENCE = "it is in the sum, as the mask is True there: by which line did it become so?"
SYMPTOMS = {"D": {"prompt in the sum": CONSEQUENCE, "padding in the sum": CONSEQUENCE}}


same = partial(
    same_as,
    unknown="no usual mistake gives this: work out by hand, for one text of four tokens, what the "
    "docstring says",
)


def words_of(function):
    """A number that stays what it is where only comments and the layout change."""
    lines = io.StringIO(inspect.getsource(function)).readline
    words = [x.string for x in tokenize.generate_tokens(lines) if x.type != tokenize.COMMENT]
    return zlib.crc32(" ".join(" ".join(words).split()).encode())


def named(letter, given):
    """Raises: Wrong where a bug is named that the program has not."""
    if given is None or given == RIGHT[letter]:
        return
    if not isinstance(given, str) or given not in SEEN:
        cause = f"BUG_{letter} is none of the strings in NAMES"
        raise Wrong("a string of NAMES", repr(given), cause)
    sentence = SYMPTOMS.get(letter, {}).get(given)
    sentence = sentence or f"with this bug {SEEN[given]}, and in program {letter} that is not so"
    raise Wrong("another name", given, f"BUG_{letter}: {sentence}")


def is_mended(letter, numbers, answer):
    """A program gives the right numbers, else numbers(answer) raises; its bug has the right name.

    Raises: Wrong, in which AS_GIVEN, the bug itself, is told to whoever has named it already;
        NotImplementedError where there is no name and the program is the skeleton's.
    """
    given = getattr(answer, f"BUG_{letter}")
    named(letter, given)
    try:
        numbers(answer)
    except Wrong as e:
        if given is not None or e.cause != AS_GIVEN[letter]:
            raise
        if words_of(getattr(answer, f"program_{letter.lower()}")) == AS_WRITTEN[letter]:
            raise NotImplementedError(f"exercise 6: program {letter}") from None
        raise Wrong(e.expected, e.got, UNMOVED) from None
    if given is None:
        cause = f"the program is mended, and BUG_{letter} does not say yet which bug it was"
        raise Wrong("a string of NAMES", "None", cause)


def over(where, values):
    return np.where(where, values, 0.0).sum(-1)


def lengths_of(B, T, rng):
    """Lengths of prompts, and of prompts with their responses [B]; the first text is padded."""
    prompts = rng.integers(2, T - 4, size=B)
    ends = np.array([rng.integers(start + 2, T + 1) for start in prompts])
    ends[0] = min(ends[0], T - 2)
    return prompts, ends


def texts(B, T, V, seed):
    """Logits, ids and the mask of the response."""
    rng = np.random.default_rng(seed)
    starts, ends = lengths_of(B, T, rng)
    place = np.arange(T)
    mask = (place >= starts[:, None]) & (place < ends[:, None])
    return rng.normal(size=(B, T, V)) * 2, rng.integers(V, size=(B, T)), mask


SIZES = [(3, 11, 7), (2, 13, 5), (1, 7, 3)]


# ---------------------------------------------------------------------------------------- A and B


def numbers_a(answer):
    for seed, (B, T, V) in enumerate(SIZES):
        logits, ids, mask = texts(B, T, V, seed)
        sums = -over(mask, token_logps(logits, ids))
        to_the_end = np.cumsum(mask[:, ::-1], -1)[:, ::-1] > 0
        wrong = {
            AS_GIVEN["A"]: sums.sum() / B / (T - 1),
            "the padded length divides, B x T": sums.sum() / B / T,
            "the sum is right, nothing divides it": sums.sum(),
            "the number of texts divides: that is a loss a text, a mean over tokens is asked for": (
                sums.mean()
            ),
            "the prompt's tokens are not in the sum, and still in the number that divides it": (
                sums.sum() / (to_the_end.sum() - B)
            ),
            "a mean for each text, and then the mean of these: a token of a short response weighs "
            "more than another": (sums / mask.sum(-1)).mean(),
            "the sign is turned": -sums.sum() / mask.sum(),
        }
        same(answer.program_a(*tensors(logits, ids, mask)), sums.sum() / mask.sum(), wrong)


def numbers_b(answer):
    for seed, (rows, T, V) in enumerate([(4, 11, 7), (3, 17, 5), (1, 13, 3)]):
        rng = np.random.default_rng(10 + seed)
        starts, ends = lengths_of(rows, T, rng)
        ends[1:2] = T  # this one is cut off: no end token
        place = np.arange(T)
        ids = np.where(place < ends[:, None], rng.integers(1, V, size=(rows, T)), 0)
        ids[np.arange(rows), ends - 1] = np.where(np.arange(rows) == 1, 1, 0)
        logps = -rng.exponential(size=(rows, T))
        begun, last = place >= starts[:, None], ends[:, None]
        mask, is_end = begun & (place < last), ids == 0
        wrong = {
            AS_GIVEN["B"]: over(mask & ~is_end, logps),
            "all that has the id of EOS counts now, so the padding is in the sum": over(
                begun, logps
            ),
            "one token of the padding is in the sum: the first EOS is the response's, the next is "
            "padding": over(begun & (place <= last), logps),
            "the prompt is in the sum: the mask begins where the response does": over(
                place < last, logps
            ),
            "only the end token is in the sum now": over(mask & is_end, logps),
            "a response that was cut off has no EOS, argmax gives 0 there: its tokens all count": (
                over(begun & (place <= is_end.argmax(-1)[:, None]), logps)
            ),
            "the last token of every text is left out: one that was cut off has no EOS": over(
                begun & (place < last - 1), logps
            ),
        }
        got = answer.program_b(*tensors(logps, ids, starts))
        same(got, over(mask, logps), wrong)


# ------------------------------------------------------------------------------------------- C


def numbers_c(answer):
    for seed, (rows, T, _) in enumerate(SIZES):
        rng = np.random.default_rng(20 + seed)
        starts, ends = lengths_of(rows, T, rng)
        logps, ref_logps = -rng.exponential(size=(2, rows, T))
        place, first, last = np.arange(T), starts[:, None], ends[:, None]
        ratios = logps - ref_logps
        right = over((place >= first) & (place < last), ratios)
        wrong = {
            AS_GIVEN["C"]: over(place < last, ratios),
            "the prompt is left out, and the padding is in the sum now": over(
                place >= first, ratios
            ),
            "the first response token is left out: its place is the prompt's length": over(
                (place > first) & (place < last), ratios
            ),
            "the prompt's last token is still in the sum": over(
                (place >= first - 1) & (place < last), ratios
            ),
            "only the prompt is in the sum now": over(place < first, ratios),
            "the end token is left out: lengths count it": over(
                (place >= first) & (place < last - 1), ratios
            ),
            "lengths is taken for the response's alone: it counts the prompt too": over(
                (place >= first) & (place < first + last), ratios
            ),
            "lengths - prompt_lengths is how many tokens the response has; its places are those "
            "behind the prompt": over(place < last - first, ratios),
            "the sign is turned: l is log pi - log pi_ref": -right,
        }
        same(answer.program_c(*tensors(logps, ref_logps, starts, ends)), right, wrong)


def who_notices(answer):
    causes = {
        "dpo": "both responses have the same prompt: what does it add to each l, and what is left "
        "of that in their difference?",
        "dro": "the residual has a single l: no other response is there that takes the prompt's "
        "part away again (V can learn it, and is no longer V*)",
    }
    for objective, cause in causes.items():
        got = answer.bug_changes_loss(objective)
        if not isinstance(got, (bool, np.bool_)):
            raise Wrong("True or False", repr(got), "a bool is asked for")
        if got != (objective == "dro"):
            raise Wrong(f"another answer for {objective}", got, f"{objective}: {cause}")


# ------------------------------------------------------------------------------------------- D


ONE_TEXT = "right for two texts or more, and with one (B = 1) targets is still a view of labels: "
ONE_TEXT += "contiguous() copies only where it must"


def numbers_d(answer):
    for seed, (rows, T, V) in enumerate(SIZES):
        logits, ids, mask = texts(rows, T, V, 30 + seed)
        at_zero = token_logps(logits, np.where(mask, ids, 0))
        right = over(mask, at_zero)
        wrong = {
            AS_GIVEN["D"] if rows > 1 else ONE_TEXT: at_zero.sum(-1),
            "the mask leaves out every label 0: 0 is a token too, only -100 is none": over(
                mask & (ids != 0), at_zero
            ),
            "the mean over the response's tokens, where the sum is asked for": right / mask.sum(-1),
            "the sum is negated": -right,
        }
        given = tensors(logits, np.where(mask, ids, -100))
        before = given[1].clone()
        same(answer.program_d(*given), right, wrong)
        if not torch.equal(given[1], before):
            cause = "the result is right, and the labels that were given in are changed: the next "
            cause += "function that asks them where -100 stands finds none"
            raise Wrong(before.double(), given[1].double(), cause)


# ------------------------------------------------------------------------------------------- E


class Policy(nn.Module):
    """Token log-probs [B, T] of a model that sees only the token before."""

    dropped: list[bool] = []  # at each call, of it and of its copies: was dropout on?

    def __init__(self, V, D):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        self.dropped.append(self.dropout.training and self.dropout.p > 0)
        logps = self.head(self.dropout(self.embedding(ids)))[:, :-1].log_softmax(-1)
        logps = logps.gather(-1, ids[:, 1:, None])[..., 0]
        return nn.functional.pad(logps, (1, 0))


def numbers_e(answer):
    for seed, (rows, T, V) in enumerate(SIZES):
        _, ids, mask = texts(rows, T, V, 40 + seed)
        policy = Policy(V, 4)
        Policy.dropped.clear()
        table, weight, bias = (
            x.detach().double().numpy()
            for x in (policy.embedding.weight, policy.head.weight, policy.head.bias)
        )
        right = over(mask, token_logps(table[ids] @ weight.T + bias, ids))
        got = answer.program_e(policy, *tensors(ids, mask))
        if any(Policy.dropped):
            again = answer.program_e(policy, *tensors(ids, mask))
            cause = AS_GIVEN["E"]
            if isinstance(got, torch.Tensor) and torch.equal(got, again):
                cause = "every call gives the same numbers now, and dropout is still on: a seed "
                cause += "chooses what is dropped, and something is dropped all the same"
            raise Wrong(right, got, cause)
        wrong = {"the mask is not used": token_logps(table[ids] @ weight.T + bias, ids).sum(-1)}
        same(got, right, wrong)
        untouched(policy)


def untouched(policy):
    """The policy is still in train mode, with its dropout, and learns."""
    if not policy.training or not policy.dropout.training or policy.dropout.p != 0.5:
        cause = "the reference is scored without dropout, and the policy has lost its own: it is to"
        cause += " be trained with it"
        raise Wrong("the policy in train mode", "its dropout is off", cause)
    if not all(x.requires_grad for x in policy.parameters()):
        cause = "the policy itself was frozen: the reference has to be a copy of it"
        raise Wrong("a policy that learns", "requires_grad is False", cause)


# ------------------------------------------------------------------------------------------- F


def numbers_f(answer):
    for seed, (rows, size, tau) in enumerate([(3, 5, 0.5), (7, 2, 2.0), (2, 3, 1.0)]):
        rng = np.random.default_rng(50 + seed)
        states, rewards, ratios = (rng.normal(size=x) for x in ((rows, size), rows, rows))
        head = nn.Linear(size, 1)
        weight, bias = (x.detach().double().numpy() for x in (head.weight, head.bias))
        V = (states @ weight.T + bias)[:, 0]
        targets = rewards - tau * ratios

        def loss(residuals):
            return (residuals**2).mean() / 2

        mixed = rewards[:, None] - tau * ratios - V[:, None]
        right = loss(targets - V)
        wrong = {
            AS_GIVEN["F"]: loss(targets - V[:, None]),
            "rewards are [B, 1] now and log_ratios still [B]: their difference is [B, B]": (
                loss(mixed)
            ),
            "log_ratios are [B, 1] now and rewards still [B]: their difference is [B, B]": loss(
                rewards - tau * ratios[:, None] - V[:, None]
            ),
            "one V for the whole batch: every prompt has its own": loss(targets - V.mean()),
            "the V of the first prompt for all: every prompt has its own": loss(targets - V[0]),
            "the sum over the batch, where the mean is asked for": right * rows,
            "the factor 1/2 is missing": 2 * right,
        }
        got = answer.program_f(head, *tensors(states, rewards, ratios), tau)
        same(got, right, wrong)
        if not isinstance(got, torch.Tensor) or not got.requires_grad:
            raise Wrong("a loss with a gradient", got, "V can't learn from it: detach, item?")


PROPERTIES = [
    Property("program A is mended and its bug named", 1, partial(is_mended, "A", numbers_a)),
    Property("program B is mended and its bug named", 2, partial(is_mended, "B", numbers_b)),
    Property("program C is mended and its bug named", 1, partial(is_mended, "C", numbers_c)),
    Property("which loss notices the bug of program C", 1, who_notices),
    Property("program D is mended and its bug named", 2, partial(is_mended, "D", numbers_d)),
    Property("program E is mended and its bug named", 1, partial(is_mended, "E", numbers_e)),
    Property("program F is mended and its bug named", 2, partial(is_mended, "F", numbers_f)),
]
