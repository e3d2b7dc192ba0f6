"""Every objective on one plane with the optimum: reward against KL to the reference, on held-out prompts.

    python -m experiments.compare                     every objective, 3 seeds: half an hour on two cores
    python -m experiments.compare --quick             one strength each, one seed, a short training: 3 minutes
    python -m experiments.compare --grid              3 learning rates x 3 strengths of each, judged on training prompts: an hour

All start from the same reference and the same first pool, its samples, and make the same number of updates; the four later pools
of the same size are each policy's own (with --evolve 1 there is the first alone: offline, everyone on the same responses). For
each seed there is one frontier, from samples of the reference and of all policies together: each sample is scored by every model
and weighed against the mixture of them all, so that no policy is measured by its own samples alone. Prints a table and writes
results/compare.txt, .csv, .json and, where matplotlib is present, .png. Seconds are of drawing pools and training, on one thread
beside another cell.
"""

import argparse
import csv
import io
import json
import math
import random
import sys
from pathlib import Path

import torch

import data
import frontier
import train
from experiments import cells
from experiments.tables import mean_and_spread
from train import Config

# What the strength of an objective is called, and its values in the grid, weak KL penalty last.
STRENGTHS = {
    "lire": ("temperature", (1.0, 2.0, 4.0)),
    "dro": ("tau", (0.5, 0.2, 0.1)),
    "dpo": ("beta", (0.3, 0.1, 0.03)),
    "kto": ("beta", (5.0, 1.0, 0.5)),
    "ipo": ("beta", (0.3, 0.1, 0.03)),
    "pl-dpo": ("beta", (1.0, 0.3, 0.1)),
    "rrhf": (
        "sft_weight",
        (30.0, 10.0, 3.0),
    ),  # the paper's 1 is of a sum, here it is of a mean over about 10 tokens
    "slic": ("sft_weight", (3.0, 1.0, 0.3)),
    "pro": ("sft_weight", (0.15, 0.05, 0.015)),
}
THREE = (
    "lire",
    "dro",
    "dpo",
    "kto",
)  # of these the comparison shows all three strengths, of the others the default
RATES = (2e-4, 5e-4, 1e-3)
COMMON = {"evolve": 5, "steps": 200, "eval_prompts": 32, "eval_samples": 32}
QUICK = {"evolve": 2, "steps": 80, "eval_prompts": 16, "eval_samples": 32, "reference_steps": 300}
COLUMNS = (
    "policy_reward win_rate kl efficiency policy_length policy_distinct entropy seconds".split()
)


def rows_of(quick: bool) -> dict:
    """{row: settings} of the comparison."""
    rows = {}
    for objective, (name, values) in STRENGTHS.items():
        for value in values if objective in THREE and not quick else [train.BEST[objective][name]]:
            rows[f"{objective}, {name} {value:g}"] = {"objective": objective, name: value}
    return rows


def grid_rows() -> dict:
    """{row: settings} of the grid: the same 3 x 3 for every objective."""
    return {
        f"{objective}, {name} {value:g}, lr {lr:g}": {"objective": objective, name: value, "lr": lr}
        for objective, (name, values) in STRENGTHS.items()
        for value in values
        for lr in RATES
    }


@torch.no_grad()
def plane(configs: dict, split: str, n: int) -> tuple[dict, list, dict]:
    """The policies of one seed's finished cells, with their reference, over prompts of `split` (heldout, train).

    Args: configs {row: Config}, alike in all that makes task and reference; n: samples a prompt of each model.
    Returns: {row: metrics}; the frontier, (KL, reward) pairs; metrics of the reference. A cell that failed has no metrics.
    """
    folders = {row: cells.folder_of(c) for row, c in configs.items()}
    saved = {row: json.loads((f / "metrics.json").read_text()) for row, f in folders.items()}
    alive = {row: f for row, f in folders.items() if "failed" not in saved[row]}
    if not alive:
        return {}, [], {}
    c = train.resolve(next(iter(configs.values())))
    world = train.make_world(c)
    examples = getattr(world, split)
    examples = random.Random(0).sample(examples, min(c.eval_prompts, len(examples)))
    weights = [
        torch.load(
            next(iter(alive.values())) / "reference.pt", map_location=c.device, weights_only=True
        )
    ]
    checkpoints = [
        torch.load(f / "checkpoint.pt", map_location=c.device, weights_only=True)
        for f in alive.values()
    ]
    if len({of["reference"] for of in checkpoints}) > 1:
        raise train.ConfigError(
            f"cells of seed {c.seed} started from unlike references: delete {cells.FOLDER} and run anew"
        )
    weights += [of["policy"] for of in checkpoints]
    model, lists = train.new_model(c, world).eval(), []
    for k, w in enumerate(weights):
        model.load_state_dict(w)
        lists.append(
            train.sample_lists(
                c, world, model, examples, n, train.rng(c.seed, "plane", split, k, device=c.device)
            )
        )
    drawn = [
        [tuple(y) for ys in of_prompt for y in ys] for of_prompt in zip(*lists)
    ]  # K n responses a prompt
    distinct = [
        {y: i for i, y in enumerate(dict.fromkeys(ys))} for ys in drawn
    ]  # the same answer is scored once
    pool = train.with_responses(examples, [[list(y) for y in of] for of in distinct])

    def of_each(values):
        """[B, K n] from a value of every distinct response."""
        return torch.tensor(
            [[v[of[y]] for y in ys] for v, of, ys in zip(values, distinct, drawn)],
            dtype=torch.float64,
        )

    rewards, logps = of_each([train.rewarded(world, e.prompt, e.response_ids) for e in pool]), []
    for w in weights:
        model.load_state_dict(w)
        logps.append(of_each(train.score_examples(c, world, model, pool)))
    logps = torch.stack(logps)  # [K, B, K n]
    log_weights = joint_weights(logps)
    reference, found = own_metrics(lists[0], logps[0], logps[0], rewards, 0, n), {}
    curve = (
        torch.stack(frontier.frontier_curve(log_weights[0], rewards), -1).mean(1).tolist()
    )  # [G, 2]
    for k, row in enumerate(alive, 1):
        f = frontier.frontier(log_weights[0], log_weights[k], rewards, seed=c.seed)
        m = own_metrics(lists[k], logps[k], logps[0], rewards, k, n)
        size = (
            f.effective_sample_size * 2 / len(weights)
        )  # as if of reference and policy alone, whatever others add
        usable = m["kl"] >= 0.05 and size >= 20
        m |= {
            name: getattr(f, name) if usable else None for name in ("efficiency", "efficiency_se")
        }
        m["effective_sample_size"] = size
        whole = not json.loads((alive[row] / "config.json").read_text())[
            "resume"
        ]  # else the clock began anew
        m["seconds"] = (
            sum(saved[row][f"seconds_{part}"] for part in ("pool", "train")) if whole else None
        )
        m["collapsed"] = collapsed(m, reference, curve[-1][0])
        found[row] = train.finite(m)
    return found, curve, train.finite(reference)


def joint_weights(logps):
    """Log importance weights [K, B, K n] of every model, normalised within each prompt, on n samples drawn from each of K models.

    Args: logps [K, B, K n], every sample scored by every model. Each is weighed against the mixture of all; K = 2 is
    frontier.mixture_weights.
    """
    return (logps - logps.logsumexp(0)).log_softmax(-1)


def grid_plane(configs: dict, n: int) -> tuple[dict, list, dict]:
    """plane() on training prompts, each policy with the reference alone: 81 policies are too many to score one another's samples."""
    planes = [plane({row: c}, "train", n) for row, c in configs.items()]
    references = [reference for _, _, reference in planes if reference]
    return (
        {row: m for found, _, _ in planes for row, m in found.items()},
        [],
        next(iter(references), {}),
    )


def collapsed(m: dict, reference: dict, most_kl: float) -> bool:
    """Does a policy say one thing a prompt, or earn less than the reference, or spend twice the KL that any optimum can use?"""
    one = m["policy_distinct"] * m["samples"] < 2 or m["entropy"] < 0.1 * reference["entropy"]
    lost = not all(math.isfinite(m[name]) for name in ("policy_reward", "kl", "entropy"))
    return one or lost or m["policy_reward"] < reference["policy_reward"] or m["kl"] > 2 * most_kl


def best(results: dict) -> dict:
    """{objective: its settings} of the grid's rows of most reward; what failed or collapsed is out."""
    found, rows = {}, grid_rows()
    for row, (m,) in results["rows"].items():
        settings = rows[row]
        if not m.get("failed") and not m["collapsed"]:
            found.setdefault(settings["objective"], []).append((m["policy_reward"], row))
    return {objective: rows[max(of)[1]] for objective, of in found.items()}


def own_metrics(lists, logps, ref_logps, rewards, k: int, n: int) -> dict:
    """Of model k's own n samples a prompt, which stand at k n in logps, ref_logps and rewards [B, K n]; 0 is the reference."""
    own = slice(k * n, (k + 1) * n)
    wins = rewards[:, own, None] - rewards[:, None, :n]
    return {
        "policy_reward": rewards[:, own].mean().item(),
        "win_rate": ((wins > 0).double() + 0.5 * (wins == 0).double()).mean().item(),
        "kl": (logps - ref_logps)[:, own].mean().item(),
        "samples": n,
        "policy_length": sum(len(y) for ys in lists for y in ys) / (len(lists) * n),
        "policy_distinct": sum(len({tuple(y) for y in ys}) for ys in lists) / (len(lists) * n),
        "entropy": -logps[:, own].mean().item(),  # nats a response
    }


def table(results: dict) -> str:
    """The table in Markdown: mean and deviation over seeds; the last column tells in how many of them what went wrong."""
    lines = ["| | " + " | ".join(COLUMNS) + " | alarm |", "|" + "---|" * (len(COLUMNS) + 2)]
    for row, found in {"reference": results["reference"], **results["rows"]}.items():
        shown = [mean_and_spread([m.get(name) for m in found]) for name in COLUMNS]
        failed, collapsed = (
            sum("failed" in m for m in found),
            sum(bool(m.get("collapsed")) for m in found),
        )
        alarm = [f"{failed} of {len(found)} failed"] * bool(failed) + [
            f"{collapsed} of {len(found)} collapsed"
        ] * bool(collapsed)
        lines.append(f"| {row} | " + " | ".join(shown) + f" | {', '.join(alarm)} |")
    return "\n".join(lines)


def as_csv(results: dict) -> str:
    """One line a row and seed."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text,
        ["row", "seed", *COLUMNS, "efficiency_se", "collapsed", "failed"],
        extrasaction="ignore",
    )
    writer.writeheader()
    for row, found in results["rows"].items():
        writer.writerows({"row": row, "seed": seed, **m} for seed, m in enumerate(found))
    return text.getvalue()


def draw(results: dict, path: Path) -> str:
    """The plane: the frontier of each seed, the reference, every row at its mean with its deviation over seeds."""
    try:
        import matplotlib
    except ImportError:
        return "no picture of the plane: pip install matplotlib draws it"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8.4, 5.4), constrained_layout=True)
    for k, curve in enumerate(results["frontiers"]):
        ax.plot(
            *zip(*curve),
            color="black",
            lw=1,
            alpha=0.7,
            label="the optimum, a line a seed" if k == 0 else None,
        )
    edge = 1.6 * max(kl for curve in results["frontiers"] for kl, _ in curve)
    base = torch.tensor([m["policy_reward"] for m in results["reference"]]).mean().item()
    ax.plot(0, base, "s", color="black", label="reference")
    objectives = list(dict.fromkeys(row.split(",")[0] for row in results["rows"]))
    for objective, marker in zip(objectives, "o^vDsPX<>*hd"):
        rows = [
            (row, found) for row, found in results["rows"].items() if row.split(",")[0] == objective
        ]
        points = []
        for row, found in rows:
            values = torch.tensor(
                [[m["kl"], m["policy_reward"]] for m in found if m.get("kl") is not None]
            )
            if len(values):
                points.append(
                    (
                        values.mean(0).tolist(),
                        values.std(0, correction=int(len(values) > 1)).tolist(),
                        row.split()[-1],
                    )
                )
        if not points:
            continue
        x, y = zip(*(mean for mean, _, _ in points))
        x_error, y_error = zip(*(spread for _, spread, _ in points))
        inside = [
            min(value, edge) for value in x
        ]  # beyond the edge of the picture a point is drawn at it
        bars = ax.errorbar(
            inside,
            y,
            y_error,
            x_error,
            fmt=marker + ("-" if len(points) > 1 else ""),
            ms=6,
            lw=1,
            label=objective,
        )
        for px, py, (mean, _, strength) in zip(inside, y, points):
            far = f" (KL {mean[0]:.0f})" if mean[0] > edge else ""
            ax.annotate(
                strength + far,
                (px, py),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
                color=bars[0].get_color(),
            )
    ax.set(
        xlabel="KL to the reference, nats",
        ylabel="reward, held-out prompts",
        xlim=(-0.02 * edge, 1.05 * edge),
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return f"picture: {path}"


def main(
    quick=False, grid=False, task="dialogue", model="gpt", seeds=None, evolve=None, jobs=0
) -> dict:
    """Run or find the cells, compare them, print and write what came out."""
    seeds = (1 if quick or grid else 3) if seeds is None else seeds
    if seeds < 1:
        raise train.ConfigError(f"--seeds must be at least 1, got {seeds}")
    if grid and (quick or evolve or seeds > 1):
        raise train.ConfigError(
            "--grid is of one seed, with settings of its own: leave --quick, --evolve and --seeds away"
        )
    rows = grid_rows() if grid else rows_of(quick)
    common = {
        "task": task,
        "model": model,
        **(QUICK if quick else COMMON),
        **({"evolve": evolve} if evolve else {}),
    }
    configs = [
        {row: Config(**common, **settings, seed=seed) for row, settings in rows.items()}
        for seed in range(seeds)
    ]
    cells.run([c for of_seed in configs for c in of_seed.values()], jobs)
    n = common["eval_samples"]
    planes = [
        grid_plane(of_seed, n) if grid else plane(of_seed, "heldout", 2 * n) for of_seed in configs
    ]
    if not all(found for found, _, _ in planes):
        raise train.ConfigError("every cell of a seed has failed: look into out/cells/*.log")
    results = {
        "settings": common
        | {"seeds": seeds, "lr": {o: of["lr"] for o, of in train.BEST.items() if o in STRENGTHS}},
        "reference": [reference for _, _, reference in planes],
        "rows": {row: [found.get(row, {"failed": True}) for found, _, _ in planes] for row in rows},
        "frontiers": [curve for _, curve, _ in planes],
    }
    name = "-".join(
        ["grid" if grid else "compare"]
        + [x for x in (task, model) if x not in ("dialogue", "gpt")]
        + [f"evolve{evolve}"] * bool(evolve)
        + ["quick"] * quick
    )
    path = Path("results") / name
    path.parent.mkdir(exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{path}.csv").write_text(as_csv(results))
    Path(f"{path}.txt").write_text(table(results) + "\n")
    told = (
        draw(results, Path(f"{path}.png"))
        if not grid
        else "most reward:\n" + "\n".join(map(str, best(results).values()))
    )
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    print(
        f"\nmean ± standard deviation over {over}, {'training' if grid else 'held-out'} prompts\n\n{table(results)}\n\n{told}"
    )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one strength each, one seed, a short training"
    )
    parser.add_argument("--grid", action="store_true", help="the grid that the defaults come from")
    parser.add_argument("--task", default="dialogue")
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--seeds", type=int, help="how many; default 3, of --quick and --grid 1")
    parser.add_argument("--evolve", type=int, help="rounds; 1: everyone on the same pool, offline")
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (default: one a core)")
    try:
        main(**vars(parser.parse_args()))
    except (train.ConfigError, data.DataError) as e:
        sys.exit(f"compare: {e}")
