"""A run's picture, from its files: `python -m harness.figures out/lire-dialogue-0` draws it anew.

Over the steps: reward and KL on held-out prompts, the loss, and what the objective is known by
(LIRE's listwise distribution, DRO's residuals). Beside them the reward-KL plane with the optimum
and the way of the policy, and DRO's V(x) against V*(x). matplotlib is needed where something is
drawn, and only there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LEVELS = {  # metric -> label, line style
    "reference_reward": ("reference", ":"),
    "best_of_8_reward": ("best of 8", "--"),
    "optimal_reward": ("optimum at the final KL", "-."),
}
CURVES = {  # title -> {column of log.jsonl: label}; the first column decides if there is a panel
    "reward, held-out prompts": {"reward": "policy"},
    "KL to the reference, nats": {"kl": None},
    "loss": {"loss": None},
    "DRO's losses": {"loss/policy": "policy", "loss/value": "value"},
    "listwise distribution": {
        "candidates/max_prob": "largest P",
        "candidates/entropy": "entropy of P, nats",
    },
    "residual r - V - tau log-ratio": {
        "residual/rms": "rms, batch",
        "residual/within_prompt": "within a prompt, held out",
    },
    "implied reward": {"rewards/margins": "best over worst candidate"},
}


def draw(folder: str | Path) -> str:
    """Draw folder/curves.png from log.jsonl, metrics.json and frontier.json.

    Returns: what to tell the user.
    """
    folder = Path(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    log_path, frontier_path = folder / "log.jsonl", folder / "frontier.json"
    log = []
    if log_path.exists():
        log = [json.loads(line) for line in log_path.read_text().splitlines()]
    if not log:
        return "no picture of the curves: the run made no step"
    try:
        import matplotlib
    except ImportError:
        return "no picture of the curves: pip install matplotlib draws it"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture = json.loads(frontier_path.read_text()) if frontier_path.exists() else {}
    known = {name for row in log for name, value in row.items() if value is not None}
    curves = [title for title, columns in CURVES.items() if next(iter(columns)) in known]
    if "DRO's losses" in curves:
        curves.remove("loss")  # it is their sum, and the policy's has no lower bound
    if len(curves) > 4 and "implied reward" in curves:
        curves.remove("implied reward")
    panels = curves + [name for name in ("frontier", "value") if name in picture]
    rows = 1 if len(panels) < 4 else 2
    columns = -(-len(panels) // rows)
    size = (4.2 * columns, 3.2 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels):
        ax.grid(alpha=0.3)
        if panel == "frontier":
            draw_frontier(ax, picture, log, metrics)
        elif panel == "value":
            draw_values(ax, picture)
        else:
            draw_curves(ax, panel, log, metrics)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7)
    fig.savefig(folder / "curves.png", dpi=120)
    plt.close(fig)
    return f"curves: {folder / 'curves.png'}"


def draw_curves(ax: Any, title: str, log: list[dict], metrics: dict) -> None:
    """Columns of the log over the steps."""
    for column, label in CURVES[title].items():
        points = [(row["step"], row[column]) for row in log if row.get(column) is not None]
        if points:
            ax.plot(*zip(*points), "o-" if len(points) < 20 else "-", ms=3, label=label)
    if "reward" in CURVES[title]:
        for name, (label, style) in LEVELS.items():
            if metrics.get(name) is not None:
                ax.axhline(metrics[name], color="gray", ls=style, label=label)
    if "residual/rms" in CURVES[title]:
        ax.set(ylim=(0, None))
    ax.set(title=title, xlabel="step")


def draw_frontier(ax: Any, picture: dict, log: list[dict], metrics: dict) -> None:
    """The reward-KL plane: the optimum, and the way of the policy."""
    ax.plot(*zip(*picture["frontier"]), color="black", label="optimum")
    way = [(row["kl"], row["reward"]) for row in log if row.get("reward") is not None]
    start = [(0.0, metrics["reference_reward"])]
    ax.plot(*zip(*start + way), "o-", ms=3, alpha=0.6, label="policy, in training")
    ax.plot(metrics["kl"], metrics["policy_reward"], "*", ms=11, label="policy")
    xlabel = "KL to the reference, nats"
    if metrics.get("optimal_tau") == 0:
        xlabel += f" (no optimum needs more than {metrics['optimal_kl']:.1f})"
    ax.set(title="reward against KL", xlabel=xlabel, xlim=(0, None))


def draw_values(ax: Any, picture: dict) -> None:
    """The value network beside V*, a point a held-out prompt."""
    ends = [min(picture["optimal_value"]), max(picture["optimal_value"])]
    ax.plot(ends, ends, color="black", label="V = V*")
    ax.plot(picture["optimal_value"], picture["value"], "o", ms=3, alpha=0.6)
    ax.set(title="value network, held-out prompts", xlabel="V*(x)", ylabel="V(x)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a finished run of train.py")
    try:
        print(draw(parser.parse_args().run))
    except (OSError, ValueError) as e:
        sys.exit(
            f"figures: {e}; expected the folder of a finished run, such as out/lire-dialogue-0"
        )
