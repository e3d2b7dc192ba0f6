"""What a right answer to exercise 4 does."""

import importlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from exercises.judge import NO_USUAL, Property, Wrong, as_array, same_number
from exercises.oracle import softmax

FORBIDDEN = ("lire", "objectives", "train", "harness", "tests")
MEAN, DEVIATION = -2.0, 1.45  # of a token's log-prob
TEMPERATURES, LENGTHS = (1, 2, 4, 8), (5, 20, 50, 128)
CLAMPED = (-2.0556, 1.3460)  # the same of min(log-prob, 0)
UNLIKE = (46, 75, 25, 61, 32, 54, 68, 39)  # tokens; the shortest is neither first nor last

HELD = set()  # what is right so far: the table is worth its lines where all of it is

# -------------------------------------------------------------------------------------- predictions


def asked_for():
    """(a key of PREDICTED, a key inside, the smallest possible value)."""
    for how in ("sum", "mean"):
        yield from ((how, T, 1 / 8) for T in TEMPERATURES)
    yield from (("shortest wins", how, 0.0) for how in ("sum", "mean"))


def predictions(answer):
    predicted = answer.PREDICTED
    try:
        values = {(a, b): predicted[a][b] for a, b, _ in asked_for()}
    except (KeyError, TypeError, IndexError) as e:
        cause = "a key of PREDICTED is missing: keep the dictionary as the skeleton has it"
        raise Wrong("PREDICTED with all its keys", f"{type(e).__name__}: {e}", cause) from None
    if all(value is None for value in values.values()):
        raise NotImplementedError("exercise 4: the predictions")
    for (first, second), value in values.items():
        said = f"PREDICTED[{first!r}][{second!r}] is {value!r}"
        if value is None:
            cause = "a prediction is missing: a wrong one has its points too, none has not"
            raise Wrong("a number in the place of every None", said, cause)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            cause = "a share lies between 0 and 1: 80 % is 0.8"
            raise Wrong("a number between 0 and 1", said, cause)
    for first, second, least in asked_for():
        if values[first, second] < least:
            said = f"PREDICTED[{first!r}][{second!r}] is {values[first, second]!r}"
            cause = "8 numbers that sum to 1 can't all be below 1/8: the largest P is at least that"
            raise Wrong("a number between 1/8 and 1", said, cause)
    HELD.add("predictions")


# --------------------------------------------------------------------------------------- simulation


def ask_scores(answer, lengths, lists, how, seed):
    generator = torch.Generator().manual_seed(seed)
    got = answer.scores(torch.tensor(lengths), lists, how, generator)
    return as_array(got, (lists, len(lengths)))


def moments(lengths, how):
    """Mean and deviation [2, M] of a response's score."""
    n = np.array(lengths, float)
    both = np.array([MEAN * n, DEVIATION * np.sqrt(n)])
    return both / n if how == "mean" else both


def wrong_moments(lengths, how):
    """Usual mistakes, and the means and deviations that they give."""
    n, M = np.array(lengths, float), len(lengths)
    mean, deviation = moments(lengths, how)
    sums, means = moments(lengths, "sum"), moments(lengths, "mean")
    longest = np.full_like(n, n.max())
    wrong = {
        "padding is in it: every response has as many tokens as the longest one": moments(
            longest, how
        ),
        "one draw stands for all tokens of a response: each token needs a draw of its own, which"
        " partly cancel": (mean, deviation * np.sqrt(n)),
        "1.45 is taken as the variance: it is the deviation": (
            mean,
            deviation / np.sqrt(DEVIATION),
        ),
        "the deviation 1.45 is missing: torch.randn has deviation 1": (
            mean,
            deviation / DEVIATION,
        ),
        "the mean of -2 a token is missing": (mean - mean, deviation),
        "the mean of a token's log-prob is -2, not 2: log-probs are negative": (-mean, deviation),
        "what was drawn above 0 is cut off (clamp): leave it as it is drawn": (
            mean / MEAN * CLAMPED[0],
            deviation / DEVIATION * CLAMPED[1],
        ),
    }
    if how == "mean":
        return wrong | {
            'how = "mean" gives sums: divide by the response\'s own length': sums,
            "the sum is divided by the longest response's length: each has its own": sums / n.max(),
            "the sum is divided by M: its own number of tokens is asked for": sums / M,
            "the sum is divided by the root of the length: a mean is divided by the length": (
                sums / np.sqrt(n)
            ),
        }
    return wrong | {
        'how = "sum" gives means: no division': means,
        "every score has the deviation of a single token: a sum over more tokens varies more": (
            mean,
            np.full_like(n, DEVIATION),
        ),
    }


def near(got, right, lists):
    """The bounds are five standard errors of a mean, and almost as many of a deviation."""
    means = np.abs(got[0] - right[0]) < 5 * right[1] / np.sqrt(lists)
    return means.all() and np.allclose(got[1], right[1], rtol=0.06)


COUNT = f"{NO_USUAL}: print the scores of a few lists, and the tokens of one response by hand"


def has_moments(got, lengths, how):
    found, right = np.array([got.mean(0), got.std(0)]), moments(lengths, how)
    if near(found, right, len(got)):
        return
    wrong = wrong_moments(lengths, how).items()
    cause = next((cause for cause, numbers in wrong if near(found, numbers, len(got))), COUNT)
    words = f"for {how}s over {list(lengths)} tokens, means and deviations "
    raise Wrong(words + str(right.round(2).tolist()), found.round(2).tolist(), cause)


def simulated(answer, how):
    lengths = (7, 41, 3, 17)
    got = ask_scores(answer, lengths, 3000, how, 0)
    if not np.isfinite(got).all():
        raise Wrong("finite scores", got[:2], "nan or inf: something is divided by 0")
    if got.shape[0] > 1 and (got == got[:1]).all():
        cause = "all lists are the same: torch.randn needs a size for the N lists too"
        raise Wrong("3000 different lists", got[:3], cause)
    has_moments(got, lengths, how)
    together = np.corrcoef(got.T) - np.eye(len(lengths))
    if np.abs(together).max() > 0.15:
        cause = "the responses of a list share draws: each has draws of its own"
        raise Wrong("responses that do not correlate", np.corrcoef(got.T), cause)
    HELD.add(how)


def sums(answer):
    simulated(answer, "sum")
    first, again, other = (ask_scores(answer, (5, 9), 3, "sum", seed) for seed in (1, 1, 2))
    if not np.array_equal(first, again):
        cause = "the generator is not used: give it to torch.randn, as generator=generator"
        raise Wrong("the same scores from a generator of the same seed", again - first, cause)
    if np.array_equal(first, other):
        cause = "every generator gives the same: it comes with a seed, leave that as it is"
        raise Wrong("other scores from a generator of another seed", other, cause)


def means(answer):
    simulated(answer, "mean")


# --------------------------------------------------------------------------------- what is measured


def wrong_largest(scores, T):
    P = softmax(scores / T)
    return {
        "T multiplies the scores: it divides them": softmax(scores * T).max(-1).mean(),
        "T is not used": softmax(scores).max(-1).mean(),
        "the largest P of all lists: it is the mean over lists of each one's largest": P.max(),
        "the softmax goes over the lists, not over the candidates of a list": (
            softmax(scores / T, axis=0).max(-1).mean()
        ),
        "the mean over lists is taken first, then the largest: each list has its own largest": (
            P.mean(0).max()
        ),
        "the mean of all P, which is always 1/M: the largest of each list comes first": P.mean(),
        "the mean largest score, not P: a softmax over each list is missing": scores.max(-1).mean(),
        "the median over lists: the mean is asked for": np.median(P.max(-1)),
        "the sum over lists: the mean is asked for": P.max(-1).sum(),
        "the smallest P of each list": P.min(-1).mean(),
    }


def largest(answer):
    cases = [(np.array([[0.0, 2.0], [6.0, 5.0]]), 2.0)]
    for seed, (N, M, T) in enumerate([(5, 3, 2.0), (7, 8, 4.0)]):
        cases.append((np.random.default_rng(seed).normal(size=(N, M)) * 3 - 9, T))
    cases.append((np.array([[-900.0, -901.0, -905.0], [-1000.0, -1000.0, -1000.0]]), 2.0))
    for drawn, T in cases:
        got = answer.largest_prob(torch.tensor(drawn, dtype=torch.float32), T)
        right = softmax(drawn / T).max(-1).mean()
        same_number(got, right, wrong_largest(drawn, T))
    HELD.add("largest")


def wins(answer):
    lengths = np.array([9, 5])
    cases = [(np.array([[0.0, 2.0], [6.0, 5.0]]), lengths)]
    cases.append((np.random.default_rng(3).normal(size=(97, 8)), np.array(UNLIKE)))
    for drawn, lengths in cases:
        best, shortest = drawn.argmax(-1), lengths.argmin()
        given = torch.tensor(drawn, dtype=torch.float32), torch.tensor(lengths)
        right = (best == shortest).mean()
        wrong = {
            "this is how often the longest wins": (best == lengths.argmax()).mean(),
            "this is how often the shortest has the lowest score: the highest has the largest P": (
                drawn.argmin(-1) == shortest
            ).mean(),
            "this is how often the first response wins: the shortest can stand anywhere": (
                best == 0
            ).mean(),
            "this is how often the last response wins: the shortest can stand anywhere": (
                best == len(lengths) - 1
            ).mean(),
            "the number of lists: their share is asked for": (best == shortest).sum(),
            "a percentage: a share between 0 and 1 is asked for": right * 100,
            "how often it does not win": 1 - right,
            "0: an integer division (//)?": 0.0,
        }
        same_number(answer.shortest_wins(*given), right, wrong)
    if HELD >= {"predictions", "sum", "mean", "largest"}:
        compare(answer)


def compare(answer):
    """Print what was predicted beside what the answer's own simulation gives."""
    print("of 8 responses          T=1    T=2    T=4    T=8   shortest wins")
    for how in ("sum", "mean"):
        seen = []
        for lengths in ((50,) * 8, UNLIKE):
            generator = torch.Generator().manual_seed(0)
            seen.append(answer.scores(torch.tensor(lengths), 1000, how, generator))
        result = [answer.largest_prob(seen[0], T) for T in TEMPERATURES]
        result.append(answer.shortest_wins(seen[1], torch.tensor(UNLIKE)))
        said = [answer.PREDICTED[how][T] for T in TEMPERATURES]
        said.append(answer.PREDICTED["shortest wins"][how])
        for name, row in (("predicted", said), ("simulated", result)):
            print(f"{how + 's,':6} {name:12}" + "".join(f" {float(x):6.2f}" for x in row))


# ------------------------------------------------------------------------------------------ picture


def picture(answer):
    try:
        importlib.import_module("matplotlib").use("Agg")  # no windows
    except ImportError:
        installed = False
    else:
        installed = True
    with tempfile.TemporaryDirectory() as folder:
        path, elsewhere = Path(folder) / "picture.png", Path(folder) / "elsewhere"
        elsewhere.mkdir()
        before = os.getcwd()
        os.chdir(elsewhere)  # a file of another name ends there, and not with the student's own
        try:
            with saved_figures() as axes:
                answer.draw(str(path))
        except ModuleNotFoundError:
            if installed:
                raise
            print("matplotlib is not installed: the picture was not checked")
            return
        finally:
            os.chdir(before)
        if not path.is_file():
            others = ", ".join(sorted(x.name for x in elsewhere.iterdir()))
            cause = "no file at the given path: savefig(path) writes it, plt.show does not"
            raise Wrong("a PNG at path", others or "no file", cause)
        content = path.read_bytes()
        if content[:8] != b"\x89PNG\r\n\x1a\n":
            cause = "the file is no PNG: savefig(path) writes one, as path ends with .png"
            raise Wrong("a PNG at path", f"{len(content)} bytes of something else", cause)
        if installed:
            looked_at(importlib.import_module("matplotlib.image").imread(path))
            compared([side for side in axes if side[1]])


@contextmanager
def saved_figures():
    """Inside, of the figure that is saved last: (its left edge, its curves) of every pair of axes.

    A curve is the numbers across and up, of four points at least; without matplotlib there is none.
    """
    axes = []

    def curves(side):
        lines = [(line.get_xdata(), line.get_ydata()) for line in side.lines]
        return [(list(x), np.asarray(y, float)) for x, y in lines if len(y) >= 4]

    try:
        Figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        yield axes
        return
    save = Figure.savefig

    def note(figure, *given, **named):
        axes[:] = [(side.get_position().x0, curves(side)) for side in figure.axes]
        return save(figure, *given, **named)

    with patch.object(Figure, "savefig", note):
        yield axes


def heights_of(how):
    """The mean largest P [T, length] of simulated lists."""
    rng, lengths = np.random.default_rng(0), np.array(LENGTHS)
    deviations = DEVIATION * lengths ** (0.5 if how == "sum" else -0.5)
    drawn = rng.normal(size=(2000, 1, 1, 8)) * deviations[:, None]
    return softmax(drawn / np.array(TEMPERATURES)[:, None, None]).max(-1).mean(0)


def compared(axes):
    """Are the curves of the picture those that are asked for? Raises: Wrong."""
    if not axes:
        return  # drawn in another way than by plot: only its colours are looked at
    axes = sorted(axes, key=lambda side: side[0])
    found = ", ".join(f"{len(own)} curves" for _, own in axes)
    if len(axes) != 2:
        cause = "sums on the left and means on the right, each with axes of its own: plt.subplots"
        raise Wrong("two pairs of axes with curves", f"{len(axes)}: {found}", cause)
    for _, own in axes:
        for across, _ in own:
            if [str(x) for x in across] in (["1", "2", "4", "8"], ["1.0", "2.0", "4.0", "8.0"]):
                cause = "T is across: the length is asked for, and a curve for each T"
                raise Wrong(f"curves over {list(LENGTHS)}", "curves over [1, 2, 4, 8]", cause)
        if len(own) != 4 or any(len(up) != 4 for _, up in own):
            cause = "a curve for each T of 1, 2, 4, 8, with a point for each length"
            raise Wrong("four curves of four points on each side", found, cause)
    # The curves of a side in any order: at each length from the lowest to the highest.
    drawn = [np.sort([up for _, up in own], 0) for _, own in axes]
    right = [np.sort(heights_of(how), 0) for how in ("sum", "mean")]
    same_as = lambda own, other: np.allclose(own, other, rtol=0, atol=0.06)
    if all(map(same_as, drawn, right[::-1])):
        raise Wrong("sums on the left, means on the right", "the two sides are swapped", "")
    for where, own, other in zip(("left, sums", "right, means"), drawn, right):
        if not same_as(own, other):
            cause = "the mean largest P of 500 lists, from your scores and largest_prob"
            if np.ptp(own, -1).max() < 1e-6:
                cause = f"every curve of it is the same at all lengths, are they drawn? {cause}"
            at = "at 5 and at 128 tokens, T from 1 to 8: "
            ends = [f"{at}{x[::-1, 0].round(2)} and {x[::-1, 3].round(2)}" for x in (other, own)]
            raise Wrong(f"{where}: {ends[0]}", ends[1], cause)


def looked_at(pixels):
    """Is there something in a picture [height, width, channels]?"""
    pixels = np.atleast_3d(pixels)[..., :3]
    if (pixels == pixels[0, 0]).all():
        cause = "the picture is empty: savefig belongs behind plot, and to the same figure"
        raise Wrong("curves", "a picture of a single colour", cause)
    if (np.ptp(pixels, axis=-1) < 0.02).all():
        cause = "no curve is in it: an empty pair of axes? plot() belongs before savefig"
        raise Wrong("curves in colours", "a picture in black and white", cause)


PROPERTIES = [
    Property("the predictions are made", 2, predictions),
    Property("the simulated scores: sums", 2, sums),
    Property("the simulated scores: means", 1, means),
    Property("the mean largest P", 2, largest),
    Property("how often the shortest response wins", 1, wins),
    Property("the picture", 2, picture),
]
