"""What a right answer to exercise 1 does."""

import numpy as np
import torch

from exercises.judge import Property, Wrong, gradient_of, same
from exercises.oracle import log_softmax, token_logps

FORBIDDEN = ("model", "t5", "data", "train", "harness", "lire", "transformers", "trl")


def texts(B, T, V, seed):
    """Random logits, ids and a mask: prompts and responses of unlike lengths, some padding."""
    rng = np.random.default_rng(seed)
    logits, ids = rng.normal(size=(B, T, V)) * 2, rng.integers(V, size=(B, T))
    starts = rng.integers(1, T - 2, size=B)  # of the response
    ends = np.array([rng.integers(s + 2, T + 1) for s in starts])
    ends[0] = T - 1  # somewhere there is padding
    place = np.arange(T)
    return logits, ids, (place >= starts[:, None]) & (place < ends[:, None])


def expected(logits, ids, mask):
    return np.where(mask, token_logps(logits, ids), 0.0).sum(-1)


def mistakes(logits, ids, mask):
    """Every usual mistake, and the numbers that it gives."""
    own, right = token_logps(logits, ids), expected(logits, ids, mask)
    late = np.pad(mask[:, :-1], ((0, 0), (1, 0)))
    early = np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    begun = np.cumsum(mask, -1) > 0
    to_the_end = np.cumsum(mask[:, ::-1], -1)[:, ::-1] > 0
    at_t = np.take_along_axis(log_softmax(logits), ids[..., None], -1)[..., 0]
    along = np.take_along_axis(log_softmax(logits[:, :-1].swapaxes(1, 2)), ids[:, None, 1:], 1)
    raw = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], -1)[..., 0]

    def over(where, values=own):
        return np.where(where, values, 0.0).sum(-1)

    return {
        "the logits at t are read for the token at t: they predict the one at t + 1": over(
            mask, at_t
        ),
        "log-probs are shifted against the ids and the mask is not: it is a place late": over(late),
        "the mean over the response's tokens, where the sum is asked for": right / mask.sum(-1),
        "the sum is divided by the padded length": right / mask.shape[-1],
        "the sum is divided by the padded length less 1": right / (mask.shape[-1] - 1),
        "the mask is not used: prompt and padding are in the sum": own.sum(-1),
        "the prompt is in the sum: what comes before the response is given": over(to_the_end),
        "the padding is in the sum": over(begun),
        "the mask is turned around: all but the response is in the sum": over(~mask),
        "the end token is left out: the mask already ends with it": over(mask & early),
        "the first response token is left out: the prompt's last place predicts it": over(
            mask & late
        ),
        "log_softmax over the places of the text, where it is over the vocabulary, the last axis": (
            over(mask[:, 1:], along[:, 0])
        ),
        "a probability, not its log": np.exp(right),
        "probabilities are added, not their logs": over(mask, np.exp(own)),
        "raw logits are added: log_softmax over the vocabulary is missing": over(mask[:, 1:], raw),
        "the sign is turned: a log-probability is at most 0": -right,
    }


def call(answer, logits, ids, mask, dtype=torch.float32):
    given = torch.tensor(logits, dtype=dtype), torch.tensor(ids), torch.tensor(mask)
    return answer.sequence_logps(*given)


def worked_example(answer):
    logits = np.log([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]]])
    case = logits, np.array([[0, 1, 2]]), np.array([[False, True, True]])
    same(call(answer, *case), [np.log(0.4)], mistakes(*case))


def odd_sizes(answer):
    for seed, sizes in enumerate([(2, 7, 11), (3, 5, 13), (1, 17, 3)]):
        case = texts(*sizes, seed)
        same(call(answer, *case), expected(*case), mistakes(*case))
    # exp(-200) is 0 in float32
    far = (
        np.array([[[0.0, 0.0, -200.0]] * 3]),
        np.array([[0, 1, 2]]),
        np.array([[False, True, True]]),
    )
    got, right = call(answer, *far), expected(*far)
    if isinstance(got, torch.Tensor) and got.isinf().any():
        cause = "log of softmax is -inf where a probability is too small for a float: log_softmax"
        raise Wrong(right, got, cause)
    same(got, right, mistakes(*far))


def padding(answer):
    logits, ids, mask = texts(3, 11, 7, 3)
    right = expected(logits, ids, mask)
    predicts = np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    for poison in (np.nan, np.inf, 1e9):
        spoilt = np.where(predicts[..., None], logits, poison)
        other = np.where(mask, ids, (ids + 1) % 7)
        got = call(answer, spoilt, other, mask)
        if isinstance(got, torch.Tensor) and got.isnan().any():
            cause = "nan from the padding gets in: it is multiplied by 0 (torch.where, masked_fill)"
            raise Wrong(right, got, cause)
        same(got, right, mistakes(spoilt, other, mask))


def half_precision(answer):
    rng = np.random.default_rng(4)
    logits = torch.tensor(rng.normal(size=(2, 203, 5)), dtype=torch.bfloat16)
    ids, mask = rng.integers(5, size=(2, 203)), np.arange(203)[None].repeat(2, 0) > 2
    right = expected(logits.double().numpy(), ids, mask)
    got = answer.sequence_logps(logits, torch.tensor(ids), torch.tensor(mask))
    if isinstance(got, torch.Tensor) and got.dtype != torch.float32:
        cause = f"the result is {got.dtype}"
        if got.dtype == logits.dtype:
            cause = "200 log-probs are added in half precision, which loses a nat"
        name = str(got.dtype).removeprefix("torch.")
        raise Wrong("float32", name, f"{cause}: logits.float() first")
    rough = logits[:, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0]
    rough = torch.where(torch.tensor(mask[:, 1:]), rough, 0.0)
    late = {
        "log_softmax in half precision, made float32 too late: logits.float() comes first": (
            rough.double().sum(-1)
        ),
        "the sum in half precision, made float32 too late: logits.float() comes first": (
            rough.sum(-1).double()
        ),
    }
    same(got, right, mistakes(logits.double().numpy(), ids, mask) | late)


def gradient(answer):
    logits, ids, mask = texts(2, 7, 5, 5)
    given = torch.tensor(ids), torch.tensor(mask)
    at = torch.tensor(logits, dtype=torch.float32)
    got = gradient_of(lambda x: answer.sequence_logps(x, *given), at)
    probs, right = np.exp(log_softmax(logits)), np.zeros_like(logits)
    for b, t in zip(*np.nonzero(mask)):  # d log softmax_y = (one at y) - softmax
        right[b, t - 1] -= probs[b, t - 1]
        right[b, t - 1, ids[b, t]] += 1
    same(torch.tensor(got), right)


VALUES = ("the worked example", "texts of odd sizes")
PROPERTIES = [
    Property("the worked example", 2, worked_example),
    Property("texts of odd sizes", 3, odd_sizes),
    Property("whatever stands in the padding changes nothing", 2, padding, after=VALUES),
    Property("half precision is computed in float32", 2, half_precision, after=VALUES),
    Property("its gradient is that of the log-probability", 1, gradient, after=VALUES),
]
