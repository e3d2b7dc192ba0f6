"""Pictures of a run, from its files: `python -m experiments.figures out/lire-dialogue-0` draws curves.png in its folder anew.

Over the steps: reward and KL on held-out prompts, the loss, and what its objective is known by (LIRE's listwise softmax, DRO's
residuals). Beside them the reward-KL plane with the optimal frontier and the way of the policy, and DRO's V(x) against V*(x).
"""

import argparse
import json
import sys
from pathlib import Path


def draw(folder) -> str:
    """Draw folder/curves.png from log.jsonl, metrics.json and frontier.json. Returns: what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "no picture of the curves: pip install matplotlib draws it"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    if not (folder / "log.jsonl").exists() and (folder / "metrics.json").exists():
        return "no picture of the curves: the run made no step"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text())
    picture = (
        json.loads((folder / "frontier.json").read_text())
        if (folder / "frontier.json").exists()
        else {}
    )
    if not log:
        return "no picture of the curves: the run made no step"

    def curve(ax, name, label=None, style="-"):
        points = [(row["step"], row[name]) for row in log if row.get(name) is not None]
        if points:
            ax.plot(*zip(*points), style, ms=3, label=label)

    panels = [
        name for name in ("reward", "kl", "loss") if any(row.get(name) is not None for row in log)
    ]
    panels.append(
        "residual"
        if "residual/rms" in log[0]
        else "softmax"
        if "candidates/max_prob" in log[0]
        else "margins"
    )
    panels += ["plane"] * ("frontier" in picture) + ["value"] * ("value" in picture)
    rows, columns = (1, len(panels)) if len(panels) < 4 else (2, -(-len(panels) // 2))
    fig, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), constrained_layout=True, squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels):
        ax.grid(alpha=0.3)
        ax.set(xlabel="step")
        if panel == "reward":
            curve(ax, "reward", "policy", "o-")
            for key, label, style in (
                ("reference_reward", "reference", ":"),
                ("best_of_8_reward", "best of 8", "--"),
                ("optimal_reward", "optimum at the final KL", "-."),
            ):
                if metrics.get(key) is not None:
                    ax.axhline(metrics[key], color="gray", ls=style, label=label)
            ax.set(title="reward, held-out prompts")
        elif panel == "kl":
            curve(ax, "kl", style="o-")
            ax.set(title="KL to the reference, nats")
        elif panel == "loss":
            for name in ("loss/policy", "loss/value") if "loss/policy" in log[0] else ("loss",):
                curve(ax, name, name)
            ax.set(title="loss")
        elif panel == "softmax":
            curve(ax, "candidates/max_prob", "largest P")
            curve(ax, "candidates/entropy", "entropy of P, nats")
            ax.set(title="listwise softmax")
        elif panel == "residual":
            curve(ax, "residual/rms", "rms, batch")
            curve(ax, "residual/within_prompt", "within a prompt, held out", "o-")
            ax.set(title="residual r - V - tau log-ratio", ylim=(0, None))
        elif panel == "margins":
            curve(ax, "rewards/margins", "best over worst candidate")
            ax.set(title="implied reward margin")
        elif panel == "plane":
            ax.plot(*zip(*picture["frontier"]), color="black", label="optimum")
            way = [(0.0, metrics["reference_reward"])]
            way += [(row["kl"], row["reward"]) for row in log if row.get("reward") is not None]
            ax.plot(*zip(*way), "o-", ms=3, alpha=0.6, label="policy, in training")
            ax.plot(metrics["kl"], metrics["policy_reward"], "*", ms=11, label="policy")
            ax.set(title="reward against KL", xlabel="KL to the reference, nats", xlim=(0, None))
        else:
            ends = [min(picture["optimal_value"]), max(picture["optimal_value"])]
            ax.plot(ends, ends, color="black", label="V = V*")
            ax.plot(picture["optimal_value"], picture["value"], "o", ms=3, alpha=0.6)
            ax.set(title="value network, held-out prompts", xlabel="V*(x)", ylabel="V(x)")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7)
    fig.savefig(folder / "curves.png", dpi=120)
    plt.close(fig)
    return f"curves: {folder / 'curves.png'}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a finished run of train.py")
    try:
        print(draw(parser.parse_args().run))
    except FileNotFoundError as e:
        sys.exit(
            f"figures: {e.filename} is not there, expected the folder of a finished run, such as out/lire-dialogue-0"
        )
