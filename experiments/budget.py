"""How much of the optimum do N rewards buy? Offline, on samples of the reference, dialogue.

    python -m experiments.budget          3 seeds: two or three hours on two cores
    python -m experiments.budget --quick  two sizes, one seed, a short training

N is how many responses were sampled and scored. DRO and KTO read them as single responses, 128 an
update; LIRE, DRO, RWR, DPO and KTO as lists of 8 of a prompt, 16 lists an update. Every objective
has the strength and rate of its default, and for each N makes 1, 3 or 10 passes: whichever earns
most on training prompts that no run reads, seed 0. What takes more than 1,600 updates is left out:
10 passes over 30,000, and all but one over 100,000. Efficiency (docs/metrics.md) is told with its
KL. A run looks at held-out prompts eight to ten times, and `reward_at_1` is its reward where it
last passed 1 nat between two looks; "-" means that it never did.

The second table shows where the probability leaks to: how many answers are broken (bad grammar,
another subject, a word off topic: reward 0), and the mean log-ratio log pi/pi_ref of broken and
unbroken answers, of samples of the reference and of the policy. The optimum is that of the policy's
KL; "-" where that is beyond the optimum of these samples, or fewer than 20 of them would tell as
much. The third table is of the tries.
Writes results/budget.json, .txt and, where matplotlib is present, .png.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

import data
import frontier
from dro import kl_divergence
from experiments.cells import folder_of, run_cells, write_results
from experiments.compare import all_weights
from experiments.tables import mean_and_spread
from harness.config import resolve
from harness.evaluation import reward_tensor
from harness.pool import (
    World,
    make_world,
    rng,
    sample_lists,
    score_lists,
    unanswered,
    with_responses,
)
from harness.reference import new_model
from harness.run import run_script
from harness.update import finite
from train import Config

SINGLE = {"candidates": 1, "batch_size": 128}
LISTS = {"candidates": 8, "batch_size": 16}
AN_UPDATE = 128  # responses, either way
ROWS = {
    "dro, single": {"objective": "dro", **SINGLE},
    "kto, single": {"objective": "kto", **SINGLE},
    "lire, lists": {"objective": "lire", **LISTS},
    "dro, lists": {"objective": "dro", **LISTS},
    "rwr, lists": {"objective": "rwr", **LISTS},
    "dpo, lists": {"objective": "dpo", **LISTS},
    "kto, lists": {"objective": "kto", **LISTS},
}
COMMON = {"task": "dialogue", "evolve": 1, "eval_prompts": 32, "eval_samples": 64}
WHOLE = {"sizes": (1_000, 3_000, 10_000, 30_000, 100_000), "passes": (1, 3, 10), "seeds": 3}
QUICK = {"sizes": (1_000, 3_000), "passes": (1, 3), "seeds": 1}
SHORT = {"reference_steps": 300, "eval_prompts": 16, "eval_samples": 32}  # of --quick
MOST_UPDATES = 1_600
LEVELS = (0.5, 1.0, 2.0)  # nats
LEAKS = """
    reference_broken policy_broken optimum_broken reference_ratio_broken reference_ratio_unbroken
    policy_ratio_broken policy_ratio_unbroken policy_unbroken_reward optimum_unbroken_reward
""".split()
SHARES = LEAKS[:3]


def config_of(row: str, size: int, passes: int, seed: int, common: dict) -> Config:
    """The cell of a row that makes so many passes over `size` scored responses."""
    steps = max(1, round(size * passes / AN_UPDATE))
    look_every = -(-steps // 10)
    own = {"steps": steps, "iterate": passes, "eval_every": look_every, "seed": seed}
    return Config(**common, **ROWS[row], **own)


def passes_to_try(size: int, passes: tuple[int, ...]) -> list[int]:
    """Those that take at most MOST_UPDATES updates."""
    return [n for n in passes if size * n / AN_UPDATE <= MOST_UPDATES]


def most_reward(tried: dict[int, float | None]) -> int:
    """The passes of most reward, the fewest where several earn it; None is a run that failed."""
    return max(tried, key=lambda x: (tried[x] is not None, tried[x] or 0.0, -x))


def reward_at(path: list[tuple[float, float]], kl: float) -> float | None:
    """The reward where a run last passes this KL, up or down, between two looks (KL, reward).

    >>> reward_at([(0.4, 5.0), (0.8, 6.0), (0.7, 6.5)], 0.75)
    6.25
    >>> reward_at([(0.4, 5.0), (0.8, 6.0), (0.7, 6.5)], 0.3) is None
    True
    """
    found = None
    for (before, less), (after, more) in zip(path, path[1:]):
        if before != after and min(before, after) <= kl <= max(before, after):
            found = less + (more - less) * (kl - before) / (after - before)
    return found


# ------------------------------------------------------------------------------- what a policy does


def small_world(c: Config) -> World:
    """The world of a seed's cells, with no more prompts to train on than one update needs."""
    return make_world(resolve(dataclasses.replace(c, steps=1, iterate=1)))


@torch.no_grad()
def unread_reward(c: Config, world: World) -> float:
    """A finished cell's reward on the last training prompts of the task, which no cell reads."""
    c, n = resolve(c), c.eval_prompts
    prompts = world.task.prompts("train", len(world.task.train) - n, n)
    examples = data.tokenize(unanswered(prompts), world.enc, c.max_prompt, c.max_response)
    _, weights = all_weights([folder_of(c)], c)
    policy = new_model(c, world).eval()
    policy.load_state_dict(weights)
    generator = rng(c.seed, "unread", device=c.device)
    lists = sample_lists(c, world, policy, examples, c.eval_samples, generator)
    return reward_tensor(world, examples, lists).mean().item()


@torch.no_grad()
def leaks(c: Config, world: World) -> dict:
    """Where a finished cell's policy has its mass, on held-out prompts: the metrics LEAKS."""
    c = resolve(c)
    examples = world.heldout[: c.eval_prompts]
    models, lists = [], []
    for k, weights in enumerate(all_weights([folder_of(c)], c)):  # the reference is the first
        models.append(new_model(c, world).eval())
        models[k].load_state_dict(weights)
        generator = rng(c.seed, "leaks", k, device=c.device)
        lists.append(sample_lists(c, world, models[k], examples, c.eval_samples, generator))
    both = [first + second for first, second in zip(*lists)]
    pool = with_responses(examples, both)
    ref_logps, logps = (torch.tensor(score_lists(c, world, model, pool)) for model in models)
    rewards = reward_tensor(world, examples, both)
    return leak_metrics((logps - ref_logps).double(), rewards == 0, rewards)


def leak_metrics(ratios: Tensor, broken: Tensor, rewards: Tensor) -> dict:
    """LEAKS of log-ratios, broken or not, and rewards [B, 2n]: n of the reference, n of the policy.

    A mean over nothing is None.
    """
    n = ratios.shape[1] // 2
    metrics = {}
    for who, own in (("reference", slice(None, n)), ("policy", slice(n, None))):
        metrics[f"{who}_broken"] = broken[:, own].double().mean().item()
        metrics[f"{who}_ratio_broken"] = ratios[:, own][broken[:, own]].mean().item()
        metrics[f"{who}_ratio_unbroken"] = ratios[:, own][~broken[:, own]].mean().item()
    metrics["policy_unbroken_reward"] = rewards[:, n:][~broken[:, n:]].mean().item()
    log_b, log_w = frontier.mixture_weights(ratios)
    tau, best = frontier.optimum_at_kl(log_b, rewards, kl_divergence(log_w, log_b).mean().item())
    # None is told of where the policy is beyond it, or a few samples stand for it.
    if not tau or frontier.effective_sample_size(best) < frontier.ENOUGH_SAMPLES:
        return finite(metrics) | {"optimum_broken": None, "optimum_unbroken_reward": None}
    weight = best.exp() * ~broken  # of unbroken answers
    metrics["optimum_broken"] = 1 - weight.sum(-1).mean().item()
    metrics["optimum_unbroken_reward"] = ((weight * rewards).sum() / weight.sum()).item()
    return finite(metrics)


def path_of(c: Config) -> list[tuple[float, float]]:
    """(KL, reward) of a finished cell's looks at held-out prompts."""
    lines = (folder_of(c) / "log.jsonl").read_text().splitlines()
    return [
        (row["kl"], row["reward"]) for row in map(json.loads, lines) if row.get("kl") is not None
    ]


# ---------------------------------------------------------------------------------- what is written


def main(quick: bool = False, jobs: int = 0) -> dict:
    """Run or find the cells, choose the passes, print and write what came out."""
    setting, common = (QUICK, COMMON | SHORT) if quick else (WHOLE, COMMON)
    places = [(row, size) for row in ROWS for size in setting["sizes"]]

    # Seed 0 tries all passes; every seed makes those that earned most.
    tries = {
        (row, size, n): config_of(row, size, n, 0, common)
        for row, size in places
        for n in passes_to_try(size, setting["passes"])
    }
    metrics = dict(zip(tries, run_cells(list(tries.values()), jobs)))
    world = small_world(next(iter(tries.values())))
    rewards = {
        key: None if "failed" in metrics[key] else unread_reward(c, world)
        for key, c in tries.items()
    }
    chosen = {
        (row, size): most_reward(
            {n: r for (*place, n), r in rewards.items() if place == [row, size]}
        )
        for row, size in places
    }
    seeds = {
        seed: {place: config_of(*place, n, seed, common) for place, n in chosen.items()}
        for seed in range(setting["seeds"])
    }
    run_cells([c for cells in seeds.values() for c in cells.values()], jobs)

    rows = {row: {size: [] for size in setting["sizes"]} for row in ROWS}
    for cells in seeds.values():
        world = small_world(next(iter(cells.values())))
        for (row, size), c in cells.items():
            rows[row][size].append(measured(c, world))
    results = {
        "settings": common | {name: setting[name] for name in ("sizes", "seeds")},
        "tried": [[*key, reward] for key, reward in rewards.items()],
        "passes": {row: {size: chosen[row, size] for size in setting["sizes"]} for row in ROWS},
        "rows": rows,
    }
    results = json.loads(json.dumps(results))  # as they are read again
    path = Path("results") / ("budget-quick" if quick else "budget")
    write_results(path.name, f"python -m experiments.budget{' --quick' * quick}", results)
    path.with_suffix(".txt").write_text(table(results) + "\n")
    print(f"\n{table(results)}\n")
    print(draw(results, path.with_suffix(".png")))
    return results


def measured(c: Config, world: World) -> dict:
    """What the tables show of a finished cell."""
    metrics = json.loads((folder_of(c) / "metrics.json").read_text())
    if "failed" in metrics:
        return metrics
    path = path_of(c)
    names = ("policy_reward", "reference_reward", "kl", "efficiency", "policy_broken")
    found = {name: metrics.get(name) for name in names} | {"path": path}
    found |= {f"reward_at_{kl:g}": reward_at(path, kl) for kl in LEVELS}
    return found | {"leaks": leaks(c, world)}


def table(results: dict) -> str:
    """The tables in Markdown: mean and deviation over seeds, where the mass goes, the tries."""
    columns = ["policy_reward", "kl", "efficiency", *(f"reward_at_{kl:g}" for kl in LEVELS)]
    lines = ["| | N | passes | " + " | ".join([*columns, "policy_broken"]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 4))
    for row, sizes in results["rows"].items():
        for size, seeds in sizes.items():
            cells = [mean_and_spread([m.get(name) for m in seeds]) for name in columns]
            cells.append(in_percent([m.get("policy_broken") for m in seeds]))
            passes = results["passes"][row][size]
            lines.append(f"| {row} | {int(size):,} | {passes} | " + " | ".join(cells) + " |")
    lines += ["", "Where the probability goes:", ""]
    lines.append("| | N | " + " | ".join(LEAKS) + " |")
    lines.append("|" + "---|" * (len(LEAKS) + 2))
    for row, sizes in results["rows"].items():
        for size, seeds in sizes.items():
            leaking = [m.get("leaks", {}) for m in seeds]
            cells = [
                (in_percent if name in SHARES else mean_and_spread)([m.get(name) for m in leaking])
                for name in LEAKS
            ]
            lines.append(f"| {row} | {int(size):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines + ["", *tries(results)])


def tries(results: dict) -> list[str]:
    """The table of the tries: reward by passes, seed 0, on training prompts that no run reads."""
    sizes = results["settings"]["sizes"]
    lines = [
        "The tries, seed 0, training prompts that no run reads: reward by passes, * is taken.",
        "",
    ]
    lines.append("| | " + " | ".join(f"{size:,}" for size in sizes) + " |")
    lines.append("|" + "---|" * (len(sizes) + 1))
    for row, chosen in results["passes"].items():
        cells = {size: [] for size in sizes}
        for name, size, passes, reward in results["tried"]:
            if name == row:
                shown = "failed" if reward is None else f"{reward:.2f}"
                cells[size].append(f"{passes}: {shown}{'*' * (chosen[str(size)] == passes)}")
        lines.append(f"| {row} | " + " | ".join(map(", ".join, cells.values())) + " |")
    return lines


def in_percent(values: list[float | None]) -> str:
    """The mean of shares, in percent; - where there is none, and how many where not all."""
    known = [value for value in values if value is not None]
    count = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.1%}{count}" if known else "-"


def draw(results: dict, path: Path) -> str:
    """Efficiency, its KL, and the reward at 1 nat, against N; bars are deviations.

    There is no point where a seed has no such number.
    """
    try:
        import matplotlib
    except ImportError:
        return "no picture of the budget: pip install matplotlib draws it"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(12, 4), sharex=True, constrained_layout=True)
    shown = {
        "efficiency": "efficiency, where all seeds have one",
        "kl": "KL, nats",
        "reward_at_1": "reward where 1 nat was last passed",
    }
    for ax, (name, label) in zip(axes, shown.items()):
        for k, (row, sizes) in enumerate(results["rows"].items()):
            points = [point_of([m.get(name) for m in seeds]) for seeds in sizes.values()]
            single = row.endswith("single")
            look = {"color": plt.cm.tab10(k), "ls": "--" if single else "-", "ms": 4}
            look |= {"marker": "s" if single else "o", "lw": 1.2, "capsize": 2}
            ax.errorbar([int(size) for size in sizes], *zip(*points), label=row, **look)
        ax.set(xscale="log", xlabel="N, scored responses", ylabel=label)
        ax.grid(alpha=0.3)
    axes[1].set_yscale("log")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside center right")
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return f"picture: {path}"


def point_of(values: list[float | None]) -> tuple[float, float]:
    """Of the seeds; nan, which leaves a gap in a line, where one of them has none."""
    if None in values:
        return float("nan"), 0.0
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, one seed")
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (0: one a core)")
    run_script("budget", lambda: main(**vars(parser.parse_args())))
