"""Every objective and the optimum on one plane: held-out reward against KL to the reference.

    python -m experiments.compare               offline, 3 seeds: 40 minutes on two cores
    python -m experiments.compare --evolve 10   with ten rounds of the policy's own samples
    python -m experiments.compare --quick       one strength each, one seed, a short training

All start from the same reference and learn from the same pool, its samples, in the same number of
updates; with --evolve the later pools, of the same size in all, are each policy's own. For each
seed there is one frontier, from samples of the reference and of all policies together: each sample
is scored by every model and weighed against the mixture of them all, so that no policy is measured
by its own samples alone. Prints a table and writes results/compare.txt, .csv, .json and, where
matplotlib is present, .png. Seconds are of drawing pools and training, on one thread beside another
cell.
"""

import argparse
import csv
import io
import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor

import frontier
from experiments.cells import FOLDER, folder_of, run_cells, write_results
from experiments.tables import mean_and_spread
from harness.config import ConfigError, resolve
from harness.evaluation import reward_tensor
from harness.pool import make_world, rng, sample_lists, score_lists, with_responses
from harness.reference import new_model
from harness.run import run_script
from harness.update import finite
from objectives import OBJECTIVES
from train import Config

# What sets the strength of an objective, and its values, weak KL penalty last: experiments.grid
# goes up and down these ladders. Others have their own strength option, at its default.
LADDERS = {
    "lire": ("temperature", (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)),
    "dro": ("tau", (5.0, 2.0, 1.0, 0.5, 0.2, 0.1)),
    "dro-p": ("tau", (5.0, 2.0, 1.0, 0.5, 0.2, 0.1)),
    "rwr": ("tau", (2.0, 1.0, 0.5, 0.2, 0.1, 0.05)),
    "kto": ("beta", (20.0, 10.0, 5.0, 2.0, 1.0, 0.5)),
    "dpo": ("beta", (5.0, 2.0, 1.0, 0.5, 0.2, 0.1)),
    "ipo": ("beta", (5.0, 2.0, 1.0, 0.5, 0.2, 0.1)),
    "pl-dpo": ("beta", (10.0, 5.0, 2.0, 1.0, 0.5, 0.2)),
    # RRHF's paper has 1, of a sum; here it is of a mean over about 15 tokens.
    "rrhf": ("sft_weight", (200.0, 100.0, 50.0, 20.0, 10.0, 5.0)),
    "slic": ("sft_weight", (20.0, 10.0, 5.0, 2.0, 1.0, 0.5)),
    "pro": ("sft_weight", (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)),
}
SHOWN_WHOLE = ("lire", "dro", "dpo", "kto", "rwr")  # with the strengths beside the default
POOL = {"evolve": 1, "candidates": 8, "batch_size": 16, "iterate": 1}
COMMON = {**POOL, "steps": 200, "eval_prompts": 32, "eval_samples": 32}
QUICK = {**POOL, "steps": 80, "eval_prompts": 16, "eval_samples": 32, "reference_steps": 300}
COLUMNS = """
    policy_reward win_rate kl efficiency policy_length policy_distinct entropy seconds
""".split()


def compare_rows(quick: bool) -> dict[str, dict]:
    """{row: settings} of the comparison: every objective that trains."""
    rows = {}
    for objective, row in OBJECTIVES.items():
        if row.loss is None:
            continue
        name, values = LADDERS.get(objective, (row.strength, ()))
        if name is None:
            rows[objective] = {"objective": objective}
            continue
        default = row.defaults[name]
        if not quick and objective in SHOWN_WHOLE and default in values:
            place = values.index(default)
            values = values[max(place - 1, 0) : place + 2]
        else:
            values = [default]
        for value in values:
            rows[f"{objective}, {name} {value:g}"] = {"objective": objective, name: value}
    return rows


@torch.no_grad()
def plane(configs: dict[str, Config], split: str, samples: int) -> tuple[dict, list, dict]:
    """The policies of one seed's finished cells, with their reference, over prompts of `split`.

    Args: configs {row: Config}, alike in all that makes task and reference; split: heldout or
        train; samples: n, how many each model draws a prompt.
    Returns: {row: metrics}; the frontier, (KL, reward) pairs; metrics of the reference. A cell that
        failed has no metrics.
    """
    folders = {row: folder_of(c) for row, c in configs.items()}
    saved = {row: json.loads((f / "metrics.json").read_text()) for row, f in folders.items()}
    alive = {row: folder for row, folder in folders.items() if "failed" not in saved[row]}
    if not alive:
        return {}, [], {}
    c = resolve(next(iter(configs.values())))
    world = make_world(c)
    examples = getattr(world, split)
    examples = random.Random(0).sample(examples, min(c.eval_prompts, len(examples)))
    weights = all_weights(list(alive.values()), c)

    # Samples of every model, K n a prompt, each scored by every model.
    model, lists = new_model(c, world).eval(), []
    for k, state in enumerate(weights):
        model.load_state_dict(state)
        generator = rng(c.seed, "plane", split, k, device=c.device)
        lists.append(sample_lists(c, world, model, examples, samples, generator))
    drawn = [sum(of_prompt, []) for of_prompt in zip(*lists)]
    rewards = reward_tensor(world, examples, drawn)
    pool, logps = with_responses(examples, drawn), []
    for state in weights:
        model.load_state_dict(state)
        logps.append(score_lists(c, world, model, pool))
    logps = torch.tensor(logps, dtype=torch.float64)  # [K, B, K n]

    # Each policy against the frontier of them all.
    log_weights = joint_weights(logps)
    reference = own_metrics(lists[0], logps[0], logps[0], rewards, 0, samples)
    curve = torch.stack(frontier.frontier_curve(log_weights[0], rewards), -1).mean(1).tolist()
    metrics = {}
    for k, row in enumerate(alive, 1):
        best = frontier.frontier(log_weights[0], log_weights[k], rewards, seed=c.seed)
        m = own_metrics(lists[k], logps[k], logps[0], rewards, k, samples)
        # As if of reference and policy alone, whatever others add.
        own = best._replace(effective_sample_size=best.effective_sample_size * 2 / len(weights))
        m["effective_sample_size"] = own.effective_sample_size
        m["beyond"] = own.tau == 0  # it spends more KL than any optimum needs
        m |= frontier.reported_efficiency(own, m["kl"])
        resumed = json.loads((alive[row] / "config.json").read_text())["resume"]
        m["seconds"] = None  # where it was resumed, the clock began anew
        if not resumed:
            m["seconds"] = saved[row]["seconds_pool"] + saved[row]["seconds_train"]
        m["collapsed"] = collapsed(m, reference, curve[-1][0])
        metrics[row] = finite(m)
    return metrics, curve, finite(reference)


def all_weights(folders: list[Path], c: Config) -> list[dict]:
    """Weights of the reference, and of the policy of every folder.

    Raises: ConfigError where they did not start from the same reference.
    """
    load = lambda path: torch.load(path, map_location=c.device, weights_only=True)
    checkpoints = [load(folder / "checkpoint.pt") for folder in folders]
    if len({checkpoint["reference"] for checkpoint in checkpoints}) > 1:
        raise ConfigError(
            f"cells of seed {c.seed} started from unlike references: delete {FOLDER} and run anew"
        )
    return [load(folders[0] / "reference.pt")] + [
        checkpoint["policy"] for checkpoint in checkpoints
    ]


def joint_weights(logps: Tensor) -> Tensor:
    """Log importance weights [K, B, K n] of every model, normalised within each prompt.

    Args: logps [K, B, K n]: n samples drawn from each of K models, every one scored by every model.
        Each is weighed against the mixture of all; K = 2 is frontier.mixture_weights.
    """
    return (logps - logps.logsumexp(0)).log_softmax(-1)


def collapsed(metrics: dict, reference: dict, most_kl: float) -> bool:
    """Does a policy say one thing a prompt, lose reward, or spend twice any optimum's KL?"""
    values = [metrics[name] for name in ("policy_reward", "kl", "entropy")]
    return (
        metrics["policy_distinct"] * metrics["samples"] < 2
        or metrics["entropy"] < 0.1 * reference["entropy"]
        or not all(map(math.isfinite, values))
        or metrics["policy_reward"] < reference["policy_reward"]
        or metrics["kl"] > 2 * most_kl
    )


def own_metrics(
    lists: list, logps: Tensor, ref_logps: Tensor, rewards: Tensor, index: int, samples: int
) -> dict:
    """Reward, win rate, KL, length, variety and entropy of one model's own samples.

    Args: lists: its responses; logps, ref_logps, rewards [B, K n], of the samples of all K models;
        index: which of them it is, 0 is the reference; samples: n, how many each draws a prompt.
    """
    own = slice(index * samples, (index + 1) * samples)
    wins = rewards[:, own, None] - rewards[:, None, :samples]
    return {
        "policy_reward": rewards[:, own].mean().item(),
        "win_rate": ((wins > 0).double() + 0.5 * (wins == 0).double()).mean().item(),
        "kl": (logps - ref_logps)[:, own].mean().item(),
        "samples": samples,
        "policy_length": sum(len(ids) for ys in lists for ids in ys) / (len(lists) * samples),
        "policy_distinct": sum(len(set(map(tuple, ys))) for ys in lists) / (len(lists) * samples),
        "entropy": -logps[:, own].mean().item(),  # nats a response
    }


# ---------------------------------------------------------------------------------- what is written


def table(results: dict) -> str:
    """The table in Markdown: mean and deviation over seeds, and how many seeds went wrong."""
    lines = ["| | " + " | ".join(COLUMNS) + " | alarm |", "|" + "---|" * (len(COLUMNS) + 2)]
    for row, seeds in {"reference": results["reference"], **results["rows"]}.items():
        cells = [mean_and_spread([m.get(name) for m in seeds]) for name in COLUMNS]
        alarms = {
            "failed": sum("failed" in m for m in seeds),
            "collapsed": sum(bool(m.get("collapsed")) for m in seeds),
            "beyond the optimum's KL": sum(bool(m.get("beyond")) for m in seeds),
        }
        alarm = ", ".join(f"{k} of {len(seeds)} {name}" for name, k in alarms.items() if k)
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {alarm} |")
    return "\n".join(lines)


def as_csv(results: dict) -> str:
    """One line a row and seed."""
    text = io.StringIO()
    columns = ["row", "seed", *COLUMNS, "efficiency_se", "collapsed", "failed"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    for row, seeds in results["rows"].items():
        writer.writerows({"row": row, "seed": seed, **m} for seed, m in enumerate(seeds))
    return text.getvalue()


def draw(results: dict, path: Path) -> str:
    """The plane: each seed's frontier, the reference, every row at its mean with its deviation."""
    try:
        import matplotlib
    except ImportError:
        return "no picture of the plane: pip install matplotlib draws it"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8.4, 5.4), constrained_layout=True)
    for k, curve in enumerate(results["frontiers"]):
        label = "the optimum, a line a seed" if k == 0 else None
        ax.plot(*zip(*curve), color="black", lw=1, alpha=0.7, label=label)
    edge = 1.6 * max(kl for curve in results["frontiers"] for kl, _ in curve)
    base = torch.tensor([m["policy_reward"] for m in results["reference"]]).mean().item()
    ax.plot(0, base, "s", color="black", label="reference")
    objectives = list(dict.fromkeys(row.split(",")[0] for row in results["rows"]))
    for objective, marker in zip(objectives, "o^vDsPX<>*hd"):
        points = []  # mean, spread, strength of each row of the objective, from left to right
        for row, seeds in results["rows"].items():
            values = [[m["kl"], m["policy_reward"]] for m in seeds if m.get("kl") is not None]
            if row.split(",")[0] == objective and values:
                values = torch.tensor(values)
                spread = values.std(0, correction=int(len(values) > 1))
                strength = "".join(row.split()[2:])  # of "dro, tau 0.5"; some have none
                points.append((values.mean(0).tolist(), spread.tolist(), strength))
        if not points:
            continue
        points.sort()
        x, y = zip(*(mean for mean, _, _ in points))
        x_error, y_error = zip(*(spread for _, spread, _ in points))
        inside = [min(value, edge) for value in x]  # what is beyond the edge is drawn at it
        style = marker + ("-" if len(points) > 1 else "")
        look = {"fmt": style, "color": plt.cm.tab20(2 * objectives.index(objective) % 19)}
        strengths = [f"{own} (KL {kl:.0f})" if kl > edge else own for (kl, _), _, own in points]
        label = f"{objective} {', '.join(strengths)}".rstrip()
        ax.errorbar(inside, y, y_error, x_error, **look, ms=6, lw=1, label=label)
    ax.set(xlabel="KL to the reference, nats", ylabel="reward, held-out prompts")
    ax.set(xlim=(-0.02 * edge, 1.05 * edge))
    ax.grid(alpha=0.3)
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    ax.legend(title="strengths, from left to right", title_fontsize=8, fontsize=8, **place)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return f"picture: {path}"


def main(
    quick: bool = False,
    task: str = "dialogue",
    model: str = "gpt",
    seeds: int | None = None,
    evolve: int | None = None,
    jobs: int = 0,
) -> dict:
    """Run or find the cells, compare them, print and write what came out.

    Raises: ConfigError where there is no seed, or every cell of a seed has failed.
    """
    usual = 1 if quick else 3
    seeds = usual if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    rows = compare_rows(quick)
    common = {"task": task, "model": model, **(QUICK if quick else COMMON)}
    other = evolve is not None and evolve != common["evolve"]
    if other:
        common["evolve"] = evolve
    configs = [
        {row: Config(**common, **settings, seed=seed) for row, settings in rows.items()}
        for seed in range(seeds)
    ]
    run_cells([c for of_seed in configs for c in of_seed.values()], jobs)
    planes = [plane(of_seed, "heldout", 2 * common["eval_samples"]) for of_seed in configs]
    if not all(metrics for metrics, _, _ in planes):
        raise ConfigError("every cell of a seed has failed: look into out/cells/*.log")
    results = {
        "settings": common
        | {"seeds": seeds, "lr": {row: resolve(c).lr for row, c in configs[0].items()}},
        "reference": [reference for _, _, reference in planes],
        "rows": {row: [m.get(row, {"failed": True}) for m, _, _ in planes] for row in rows},
        "frontiers": [curve for _, curve, _ in planes],
    }
    words = ["compare", *(word for word in (task, model) if word not in ("dialogue", "gpt"))]
    words += [f"evolve{evolve}"] * other + ["quick"] * quick
    options = ["--quick"] * quick
    options += [f"--task {task}"] * (task != "dialogue") + [f"--model {model}"] * (model != "gpt")
    options += [f"--evolve {evolve}"] * other + [f"--seeds {seeds}"] * (seeds != usual)
    path = Path("results") / "-".join(words)
    write_results(path.name, " ".join(["python -m experiments.compare", *options]), results)
    Path(f"{path}.csv").write_text(as_csv(results))
    Path(f"{path}.txt").write_text(table(results) + "\n")
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    print(f"\nmean ± standard deviation over {over}, held-out prompts\n\n{table(results)}\n")
    print(draw(results, Path(f"{path}.png")))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one strength, one seed, few steps")
    parser.add_argument("--task", default="dialogue")
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--seeds", type=int, help="how many; default 3, of --quick 1")
    parser.add_argument(
        "--evolve", type=int, help="rounds; default 1: offline, all on the same pool"
    )
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (0: one a core)")
    run_script("compare", lambda: main(**vars(parser.parse_args())))
