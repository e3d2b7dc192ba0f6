"""The numbers of the lecture figures (experiments/lecture.py), and where words can stand in them.

Each function gives what one figure shows: of a formula, of runs of a few seconds on the task tiny,
whose settings stand above it, or of a file of results/.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import baselines
import dro
import lire
from experiments.cells import run_quietly
from experiments.compare import compare_rows
from train import Config

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


class Finished(NamedTuple):
    """What a run has left."""

    log: list[dict]
    metrics: dict
    picture: dict  # frontier.json


RUN = {
    **{"task": "tiny", "device": "cpu", "layers": 1, "heads": 2, "width": 64},
    **{"reference_steps": 150, "reference_batch": 8, "eval_prompts": 20, "eval_samples": 16},
}


def finished(*settings: dict) -> list[Finished]:
    """Runs with RUN and these settings, in a folder of their own that is removed again."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for k, own in enumerate(settings):
            out = Path(folder) / f"run-{k}"
            metrics, log = run_quietly(Config(**RUN | own, out=str(out)))
            runs.append(Finished(log, metrics, json.loads((out / "frontier.json").read_text())))
    return runs


def column(log: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have it."""
    return [(row["step"], row[name]) for row in log if row.get(name) is not None]


# -------------------------------------------------------------------- lecture 1: lists and LIRE

CANDIDATES, TOKEN_MEAN, TOKEN_DEVIATION = 8, -2.0, 1.45  # log-probs of tokens, nats
TEMPERATURES = (1, 2, 4, 8)
LENGTHS = tuple(range(129))  # tokens
UNLIKE = (25, 32, 39, 46, 54, 61, 68, 75)  # tokens of the responses of one list
SCORES = {"sum": 2.0, "mean": 0.2}  # and the T that gives P some spread under it


def candidate_probs(scores: Tensor, temperature: float) -> Tensor:
    """P of lists whose candidates are all real, [N, M]."""
    return lire.candidate_probs(scores, torch.ones_like(scores, dtype=torch.bool), temperature)


def largest_probs(M: int = CANDIDATES, lists: int = 4000) -> dict[int, list[float]]:
    """{T: the mean largest P at each of LENGTHS}, of lists whose responses are all of one length.

    A sum of n tokens' log-probs is drawn at once: its deviation is sqrt(n) times a token's.
    """
    noise = torch.randn(lists, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = {n: n * TOKEN_MEAN + n**0.5 * TOKEN_DEVIATION * noise for n in LENGTHS}
    largest = lambda own, T: candidate_probs(own, T).amax(-1).mean().item()
    return {T: [largest(own, T) for own in scores.values()] for T in TEMPERATURES}


def probs_by_length(
    lists: int = 4000, deviation: float = TOKEN_DEVIATION
) -> dict[str, list[float]]:
    """{"sum", "mean": the mean P of each response of a list, the shortest first}."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(UNLIKE, dtype=torch.float64)
    noise = torch.randn(lists, len(UNLIKE), generator=generator, dtype=torch.float64)
    sums = lengths * TOKEN_MEAN + lengths.sqrt() * deviation * noise
    scores = {"sum": sums, "mean": sums / lengths}
    return {how: candidate_probs(scores[how], T).mean(0).tolist() for how, T in SCORES.items()}


MARGINS = torch.linspace(-20, 20, 401, dtype=torch.float64)  # s_w - s_l, nats


def weights(
    margins: Tensor = MARGINS, temperature: float = 2.0, reward_gap: float = 2.0, beta: float = 0.5
) -> dict[str, Tensor]:
    """-d loss / d s_w of a pair {"LIRE", "DPO": [N]}, by the gradient of either."""
    scores = torch.stack([margins, torch.zeros_like(margins)], -1)  # [N, 2], the better one first
    mask = torch.ones_like(scores, dtype=torch.bool)
    rewards = torch.tensor([reward_gap, 0.0], dtype=scores.dtype).expand_as(scores)
    rewards = lire.transform_rewards(rewards, mask, "softmax")
    chosen, zero = margins.clone().requires_grad_(), torch.zeros_like(margins)
    loss = baselines.dpo_loss(chosen, zero, zero, zero, beta).sum()
    return {
        "LIRE": -lire.lire_grad(scores, rewards, mask, temperature)[:, 0],
        "DPO": -torch.autograd.grad(loss, chosen)[0],
    }


POOL = {
    **{"objective": "lire", "candidates": 4, "evolve": 6, "iterate": 1, "lr": 2e-3},
    **{"steps": 120, "eval_every": 20, "reference_lr": 3e-3, "batch_size": 16},
}
POOLS = {
    "a pool dies": {"sample_temperature": 0.2, "temperature": 2.0, "sft_weight": 0.0},
    "a pool lives": {"sample_temperature": 1.0, "temperature": 8.0, "sft_weight": 0.1},
}
SEEDS = (0, 1, 2)
SHARES = {
    "lists/distinct": "different candidates",
    "lists/tied": "tied lists",
    "reward": "reward, held out",
}


def pool_rounds() -> dict[str, dict[str, list[float]]]:
    """{pool: {metric of SHARES: its mean over SEEDS in every round}}; shares are in per cent.

    The reward is that of held-out prompts at the round's end.
    """
    rounds = {}
    for name, own in POOLS.items():
        runs = finished(*(POOL | own | {"seed": seed} for seed in SEEDS))
        last = [{row["round"]: row for row in run.log}.values() for run in runs]  # of each round
        rounds[name] = {
            metric: [
                statistics.mean(row[metric] for row in rows) * (1 if metric == "reward" else 100)
                for rows in zip(*last)
            ]
            for metric in SHARES
        }
    return rounds


# ------------------------------------------------------------- lecture 2: the optimum and DRO

REF, REWARDS = (0.5, 0.3, 0.2), (1.0, 0.0, -1.0)
TAUS = (5.0, 1.0, 0.5, 0.1)


def example() -> tuple[Tensor, Tensor]:
    """log pi_ref and r of one prompt with three responses, [1, 3] each."""
    return torch.tensor([REF], dtype=torch.float64).log(), torch.tensor([REWARDS]).double()


def optima() -> dict[float, tuple[float, list[float]]]:
    """{tau: (V*, pi*)} of the example."""
    found = {}
    for tau in TAUS:
        best = dro.optimal_logps(*example(), tau)[0].exp()
        found[tau] = dro.optimal_value(*example(), tau).item(), best.tolist()
    return found


STEPS, RATE = 40, 0.5
COEFFICIENTS = {"tau/2": lambda tau: tau / 2, "1/2": lambda tau: 0.5}
DESCENT_TAUS = (0.5, 5.0)


def descent(tau: float, coefficient: float, steps: int = STEPS) -> list[float]:
    """KL(pi* || pi) before each step of gradient descent in expectation over y ~ pi_ref.

    The policy is a softmax of three logits, V one number. dro.dro_v_losses has tau/2 before l^2;
    what another coefficient adds to it is added here.
    """
    ref_logps, rewards = (x[0] for x in example())
    best = dro.optimal_logps(*example(), tau)
    logits, value, path = ref_logps.clone(), torch.zeros((), dtype=torch.float64), []
    for _ in range(steps + 1):
        logits.requires_grad_(), value.requires_grad_()
        logps = logits.log_softmax(-1)
        path.append(dro.kl_divergence(best, logps.detach()[None]).item())
        values = value.expand_as(logps)
        policy, fit = dro.dro_v_losses(logps, ref_logps, rewards, values, tau)
        policy = policy + (coefficient - tau / 2) * (logps - ref_logps).square()
        slopes = torch.autograd.grad((ref_logps.exp() * (policy + fit)).sum(), (logits, value))
        logits, value = (x.detach() - RATE * slope for x, slope in zip((logits, value), slopes))
    return path


def descents() -> dict[float, dict[str, list[float]]]:
    """{tau: {coefficient: path of `descent`}}."""
    return {
        tau: {name: descent(tau, of_tau(tau)) for name, of_tau in COEFFICIENTS.items()}
        for tau in DESCENT_TAUS
    }


MEMORISE = {
    **{"objective": "dro", "tau": 1.0, "candidates": 1, "evolve": 0, "batch_size": 60},
    **{"lr": 1e-9, "value_lr": 2e-3, "steps": 150, "eval_every": 10, "reference_steps": 60},
    "iterate": 1,
}
RESIDUALS = ("residual/rms", "residual/within_prompt")


def memorised() -> dict[str, list[tuple[float, float]]]:
    """{column: (step, value)} of a V that learns one response a prompt by heart.

    The policy is held still by its rate, so there is nothing that could be learnt.
    """
    (run,) = finished(MEMORISE)
    return {name: column(run.log, name) for name in RESIDUALS}


VALUES = {
    **{"objective": "dro", "tau": 0.5, "candidates": 16, "batch_size": 60, "lr": 2e-3},
    **{"eval_every": 1000, "reference_steps": 500, "iterate": 1},
}
UPDATES = {3: 1, 60: 10, 400: 80}  # and rounds: new samples, so that no list is learnt by heart


def values_in_training() -> dict[int, dict[str, list[float]]]:
    """{updates: V and V* of every held-out prompt, {"value", "optimal_value"}}, a run each."""
    runs = finished(*(VALUES | {"steps": n, "evolve": k} for n, k in UPDATES.items()))
    return {
        n: {name: run.picture[name] for name in ("value", "optimal_value")}
        for n, run in zip(UPDATES, runs)
    }


# ------------------------------------------------------------------- lecture 3: what one measures

LOGPS = {"logps/chosen": "chosen", "logps/rejected": "rejected"}
DPO = {
    **{"objective": "dpo", "beta": 0.1, "candidates": 8, "sample_temperature": 0.3, "evolve": 1},
    **{"batch_size": 60, "steps": 50, "eval_every": 50, "reference_steps": 1000, "lr": 5e-4},
}


def pair_logps() -> dict[str, list[tuple[float, float]]]:
    """{column of LOGPS: (step, value)} of a DPO run, means over all pairs of the pool."""
    (run,) = finished(DPO)
    return {name: column(run.log, name) for name in LOGPS}


class Plane(NamedTuple):
    """The reward-KL plane of results/compare.json, means over seeds."""

    frontier: list[tuple[float, float]]  # (KL, reward), rising
    reference: float  # reward
    points: dict[str, tuple[float, float]]  # objective: (KL, reward)
    efficiency: dict[str, float]  # of those that have one


def read_results(name: str) -> dict:
    """What results/NAME.json holds."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def mean_of(seeds: list[dict], name: str) -> float | None:
    """Over the seeds that have it; None where none has."""
    values = [m[name] for m in seeds if m.get(name) is not None]
    return statistics.mean(values) if values else None


def plane() -> Plane:
    """Every objective at its default strength."""
    results = read_results("compare")
    own = {row: results["rows"][row] for row in compare_rows(quick=True) if row in results["rows"]}
    rows = {row.split(",")[0]: seeds for row, seeds in own.items() if mean_of(seeds, "kl")}
    curves = torch.tensor(results["frontiers"], dtype=torch.float64)  # [seeds, G, 2]
    efficiency = {name: mean_of(seeds, "efficiency") for name, seeds in rows.items()}
    return Plane(
        [tuple(point) for point in curves.mean(0).tolist()],
        mean_of(results["reference"], "policy_reward"),
        {name: (mean_of(m, "kl"), mean_of(m, "policy_reward")) for name, m in rows.items()},
        {name: value for name, value in efficiency.items() if value is not None},
    )


def efficiency_by_size() -> dict[str, list[tuple[int, float]]]:
    """{row of results/budget.json: (N, mean efficiency), where every seed has one}."""
    return {
        row: [
            (int(n), mean_of(seeds, "efficiency"))
            for n, seeds in own.items()
            if all(m.get("efficiency") is not None for m in seeds)
        ]
        for row, own in read_results("budget")["rows"].items()
    }


# ---------------------------------------------------------------------------- where words can stand

PLACES = [(1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]  # of a label
Box = tuple[float, float, float, float]  # x, y of its middle, half its width, half its height


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share.

    >>> overlap((0.0, 0.0, 2.0, 1.0), (3.0, 1.0, 2.0, 1.0))  # 1 wide, 1 high
    1.0
    """
    sides = [
        min(one[k] + one[k + 2], other[k] + other[k + 2])
        - max(one[k] - one[k + 2], other[k] - other[k + 2])
        for k in (0, 1)
    ]
    return max(sides[0], 0) * max(sides[1], 0)


def label_offsets(
    points: dict[str, tuple[float, float]], line: list, size: float, left: float
) -> dict[str, tuple[float, float]]:
    """Where the middle of each name goes, seen from its own point.

    Of PLACES it takes the one that covers least of the line, of the points and of earlier names.

    Args: points, line: on the picture, in points of type; size: of the type; left: x that no name
        may pass.
    """
    taken = [(x, y, 7, 7) for x, y in points.values()] + [(x, y, 4, 4) for x, y in line]
    offsets = {}
    for name, (x, y) in points.items():
        wide, high = 0.36 * size * len(name), 0.5 * size  # half of each
        moves = [((wide + 11) * i, (high + 9) * j) for i, j in PLACES]
        boxes = {move: (x + move[0], y + move[1], wide, high) for move in moves}
        inside = {move: box for move, box in boxes.items() if box[0] - wide > left}
        cover = {move: sum(overlap(box, own) for own in taken) for move, box in inside.items()}
        offsets[name] = best = min(cover, key=cover.get)
        taken.append(boxes[best])
    return offsets


def spread(ends: dict[str, float], gap: float) -> dict[str, float]:
    """Heights for words at these heights, pushed apart where two are nearer than the gap.

    >>> spread({"one": 0.5, "two": 0.5, "far": 0.0}, 0.25)
    {'far': 0.0, 'one': 0.375, 'two': 0.625}
    """
    names = sorted(ends, key=ends.get)
    heights = [ends[name] for name in names]
    for _ in range(200):
        for k in range(len(heights) - 1):
            lack = max(gap - (heights[k + 1] - heights[k]), 0.0)
            heights[k : k + 2] = heights[k] - lack / 2, heights[k + 1] + lack / 2
    return dict(zip(names, heights))
