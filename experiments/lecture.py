"""The figures of three lectures, in one style: a message each, readable from the last row.

    python -m experiments.lecture              all of them into out/lecture/, in 80 s
    python -m experiments.lecture weights      one of them, by its name in FIGURES
    python -m experiments.lecture --out DIR    elsewhere; those of the repository: assets/lecture

A figure is a row of FIGURES: a function of lecture_data.py that computes its numbers (from a
formula, from runs of seconds on the task tiny, or from a file of results/), a function that draws
them, and what to see. All of them come with captions.md. matplotlib is needed where something is
drawn, and only there.
"""

import argparse
import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.lecture_data import (
    CANDIDATES,
    LENGTHS,
    LOGPS,
    MARGINS,
    REF,
    RESULTS,
    REWARDS,
    SCORES,
    SHARES,
    STEPS,
    UNLIKE,
    Plane,
    descents,
    efficiency_by_size,
    label_offsets,
    largest_probs,
    memorised,
    optima,
    pair_logps,
    plane,
    pool_rounds,
    probs_by_length,
    spread,
    values_in_training,
    weights,
)
from harness.config import ConfigError
from harness.run import run_script, save

# -------------------------------------------------------------------------------------------- style

# Okabe and Ito's colours: they differ for colour-blind eyes too, and in grey.
BLUE, RED, GREEN, ORANGE, GRAY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#595959"
SIZE, DPI, MOST_BYTES = (13.33, 7.5), 96, 100_000  # inches of a 16:9 slide; 1280 x 720
COLOURS = 64  # of a picture: a quarter of the bytes, and nobody sees it
STYLE = {
    "font.size": 20,
    "axes.titlesize": 21,
    "axes.labelsize": 20,
    **{"xtick.labelsize": 18, "ytick.labelsize": 18},
    "figure.titlesize": 25,
    "figure.titleweight": "bold",
    "figure.constrained_layout.use": True,
    **{"figure.constrained_layout.h_pad": 0.15, "figure.constrained_layout.w_pad": 0.15},
    "lines.linewidth": 4,
    "lines.markersize": 12,
    "axes.linewidth": 1.5,
    **{"axes.spines.top": False, "axes.spines.right": False},
    "axes.titlepad": 14,
}


def panels(fig: Any, message: str, count: int = 1) -> list:
    """The axes of a figure, side by side under its message."""
    fig.suptitle(textwrap.fill(message, 60), x=0.015, ha="left")
    return list(fig.subplots(1, count, squeeze=False)[0])


def say(ax: Any, text: str, at: tuple[float, float], color: str, **how: Any) -> None:
    """Words at a point, in the colour of what they name; there are no legends to look up."""
    place = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
    ax.annotate(text, at, color=color, fontweight="bold", annotation_clip=False, **place | how)


def write_picture(fig: Any, path: Path) -> int:
    """Save a figure in few colours.

    Returns: bytes. Raises: ValueError where they are more than MOST_BYTES.
    """
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=DPI, format="png")
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MOST_BYTES:,}")
    return size


# ------------------------------------------------------------------------ lecture 1: lists and LIRE


def draw_largest_probs(fig: Any, data: dict) -> None:
    """A line a temperature, named at its end."""
    (ax,) = panels(fig, "The longer the responses, the more one of 8 takes it all")
    for (T, values), color in zip(data.items(), (RED, ORANGE, GREEN, BLUE)):
        ax.plot(LENGTHS, values, color=color)
        say(ax, f"T = {T}", (LENGTHS[-1], values[-1]), color)
    ax.axhline(1 / CANDIDATES, color=GRAY, ls=":")
    say(ax, "all alike: 1/8", (LENGTHS[-1], 1 / CANDIDATES), GRAY, xytext=(0, 18), ha="right")
    ax.set(xlabel="tokens of a response", ylabel="largest P of a list, mean", ylim=(0, 1.02))
    ax.set(xlim=(0, LENGTHS[-1]), xticks=(5, 20, 50, 75, 100, 128))


def draw_probs_by_length(fig: Any, data: dict) -> None:
    """Bars, the shortest response at the left; a panel a score."""
    axes = panels(fig, "A sum prefers the short responses, a mean hardly does", 2)
    for ax, how, color in zip(axes, data, (RED, BLUE)):
        ax.bar([str(n) for n in UNLIKE], data[how], color=color)
        ax.axhline(1 / len(UNLIKE), color=GRAY, ls=":")
        ax.set(ylim=(0, 1.15 * max(map(max, data.values()))), xlabel="tokens of the response")
        ax.set_title(f"{how} of its log-probs, T = {SCORES[how]:g}", color=color, weight="bold")
    say(axes[1], "1/8", (7.4, 1 / 8), GRAY, xytext=(0, 14), ha="right")
    axes[0].set(ylabel="P, mean over lists")


def draw_weights(fig: Any, data: dict) -> None:
    """Both as shares of their largest, because their units differ."""
    (ax,) = panels(fig, "A pair in the wrong order: DPO pulls hardest, LIRE lets go")
    for values, color in zip(data.values(), (BLUE, RED)):
        ax.plot(MARGINS, values / values.max(), color=color)
    ax.axvspan(MARGINS[0].item(), 0, color=GRAY, alpha=0.12, lw=0)
    ax.axvline(0, color=GRAY, lw=1.5)
    say(ax, "DPO: tends to beta", (-19.5, 0.92), RED, xytext=(0, 0))
    say(ax, "LIRE: tends to 0", (-19.5, 0.08), BLUE, xytext=(0, 0))
    say(ax, "wrong order", (-0.5, 1.1), GRAY, xytext=(0, 0), ha="right")
    say(ax, "right order", (0.5, 1.1), GRAY, xytext=(0, 0))
    ax.set(xlabel="margin s_w - s_l, nats", ylabel="weight of the pair / its largest")
    ax.set(xlim=(-20, 20), ylim=(0, 1.16), yticks=(0, 0.25, 0.5, 0.75, 1))


def draw_pool_rounds(fig: Any, data: dict) -> None:
    """A panel a metric, both pools in each."""
    axes = panels(fig, "Lists of equal candidates teach LIRE nothing", len(SHARES))
    for ax, (metric, title) in zip(axes, SHARES.items()):
        for rounds, color in zip(data.values(), (RED, BLUE)):
            values = rounds[metric]
            ax.plot(range(1, len(values) + 1), values, "o-", color=color, clip_on=False)
        ax.set(xlabel="round", title=title, xticks=range(1, len(values) + 1))
        ax.locator_params(axis="y", nbins=5)
        if metric.startswith("lists/"):
            ax.set(ylim=(0, 100), yticks=(0, 50, 100), yticklabels=("0", "50 %", "100 %"))
    for (name, rounds), color in zip(data.items(), (RED, BLUE)):
        at = len(values), rounds["lists/distinct"][-1]
        say(axes[0], name, at, color, xytext=(0, -34), ha="right")


# ------------------------------------------------------------------- lecture 2: the optimum and DRO


def draw_optima(fig: Any, data: dict) -> None:
    """A group of bars a tau, V* below; the reference is the first group."""
    (ax,) = panels(fig, "The smaller tau, the more pi* bets on the best response")
    start = sum(p * r for p, r in zip(REF, REWARDS))
    groups = {"pi_ref": (start, REF)} | {f"tau {tau:g}": own for tau, own in data.items()}
    for k, (r, color) in enumerate(zip(REWARDS, (BLUE, ORANGE, RED))):
        bars = [x + 0.27 * (k - 1) for x in range(len(groups))]
        heights = [probs[k] for _, probs in groups.values()]
        ax.bar(bars, heights, 0.25, color=color)
        say(ax, f"■ r = {r:g}", (-0.4, 0.95 - 0.07 * k), color, xytext=(0, 0))
    names = [f"{name}\nV* = {value:.2f}" for name, (value, _) in groups.items()]
    names[0] = f"pi_ref\nE r = {start:.2f}"
    ax.set(xticks=range(len(groups)), xticklabels=names, ylabel="probability", ylim=(0, 1.02))


def draw_descents(fig: Any, data: dict) -> None:
    """A panel a tau, on a logarithmic axis that ends before rounding does the talking."""
    axes = panels(fig, "tau/2 reaches pi*; the printed 1/2 stops short or diverges", len(data))
    for ax, (tau, paths) in zip(axes, data.items()):
        for (name, path), color in zip(paths.items(), (BLUE, RED)):
            shown = [(step, kl) for step, kl in enumerate(path) if 1e-6 < kl < 1e3]
            ax.plot(*zip(*shown), color=color)
            place = {"xytext": (-4, -28 if color == BLUE else 24), "ha": "right"}
            say(ax, name, shown[-1], color, **(place if shown[-1][0] == STEPS else {}))
        ax.set(yscale="log", ylim=(1e-6, 1e3), xlim=(0, STEPS), xlabel="steps")
        ax.set(title=f"tau = {tau:g}")
    axes[0].set(ylabel="KL(pi* || pi), nats")


def draw_memorised(fig: Any, data: dict) -> None:
    """Both residuals over the steps, named on the lines."""
    (ax,) = panels(fig, "V learns prompts by heart: only within_prompt shows it")
    wheres = ("training prompts", "held-out prompts, V cancels")
    for (name, points), color, where in zip(data.items(), (RED, BLUE), wheres):
        ax.plot(*zip(*points), color=color)
        say(ax, f"{name}\n{where}", points[len(points) // 2], color, xytext=(0, 46))
    most = max(value for points in data.values() for _, value in points)
    ax.set(xlabel="updates of V; the policy stays as it was", ylabel="residual")
    ax.set(ylim=(0, 1.2 * most), xlim=(0, None))


def draw_values(fig: Any, data: dict) -> None:
    """A panel for each number of updates, on the same axes, with the line V = V*."""
    axes = panels(fig, "V(x) climbs to V*(x), while the policy climbs to pi*", len(data))
    best = [x for own in data.values() for x in own["optimal_value"]]
    every = best + [x for own in data.values() for x in own["value"]]
    pad = 0.08 * (max(every) - min(every))
    low, high = min(every) - pad, max(every) + pad
    for ax, (updates, own), color in zip(axes, data.items(), (RED, ORANGE, BLUE)):
        ends = min(best) - pad, max(best) + pad
        ax.plot(ends, ends, color=GRAY)
        ax.plot(own["optimal_value"], own["value"], "o", color=color, alpha=0.7)
        ax.set_title(f"{updates} updates", color=color, weight="bold")
        ax.set(xlim=ends, ylim=(low, high), xlabel="V*(x), exact")
    say(axes[0], "V = V*", (min(best), min(best)), GRAY, xytext=(0, -26))
    axes[0].set(ylabel="V(x) of the network")


# --------------------------------------------------------------------- lecture 3: what one measures


def draw_pair_logps(fig: Any, data: dict) -> None:
    """Both lines, and between them the margin at the end."""
    (ax,) = panels(fig, "DPO: the margin grows, and both log-probs fall")
    chosen, rejected = (data[name] for name in LOGPS)
    for points, label, color in zip((chosen, rejected), LOGPS.values(), (BLUE, RED)):
        ax.plot(*zip(*points), "o-", color=color)
        say(ax, label, points[-1], color)
    steps = [step for step, _ in chosen]
    ax.plot([steps[0], steps[-1]], [chosen[0][1]] * 2, color=BLUE, ls=":")
    say(ax, "where it began", (steps[-1], chosen[0][1]), BLUE, xytext=(0, 16), ha="right")
    ax.fill_between(steps, [y for _, y in rejected], [y for _, y in chosen], color=GRAY, alpha=0.15)
    at = (chosen[-2][1] + rejected[-2][1]) / 2
    say(ax, "margin", (chosen[-2][0], at), GRAY, xytext=(0, 0), ha="center")
    ax.set(xlabel="updates", ylabel="log-prob of a response, nats", xlim=(0, None))


def draw_plane(fig: Any, data: Plane) -> None:
    """A point an objective, its name where it hides no other; LIRE and DRO in their colours."""
    first = max(data.points, key=lambda name: data.points[name][1]).upper()
    nearest = max(data.efficiency, key=data.efficiency.get).upper()
    (ax,) = panels(fig, f"{first} earns most, {nearest} comes nearest to the optimum")
    edge = 1.15 * max(kl for kl, _ in data.points.values())
    rewards = [reward for kl, reward in data.frontier if kl <= edge]
    ax.set(xlim=(0, edge), ylim=(data.reference - 0.3, max(rewards) + 0.2))
    ax.set(xlabel="KL to the reference, nats", ylabel="reward, held-out prompts")
    ax.plot(*zip(*data.frontier), color="black")
    at = min(data.frontier, key=lambda point: abs(point[0] - 0.55 * edge))
    say(ax, "the optimum", at, "black", xytext=(-10, 22), ha="right")
    points = {"reference": (0.0, data.reference)} | data.points
    colours = {"reference": "black", "lire": BLUE, "dro": RED}
    for name, (x, y) in points.items():
        look = {"color": colours.get(name, GRAY), "clip_on": False}
        ax.plot(x, y, "s" if name == "reference" else "o", **look)
    fig.draw_without_rendering()  # the layout has to be known before words can be placed
    seen = lambda own: ax.transData.transform(own) * 72 / fig.dpi
    at = {name: tuple(seen(point)) for name, point in points.items()}
    left, size = ax.bbox.x0 * 72 / fig.dpi, STYLE["font.size"]
    for name, offset in label_offsets(at, list(seen(data.frontier)), size, left).items():
        place = {"xytext": offset, "ha": "center", "in_layout": False}
        say(ax, name, points[name], colours.get(name, GRAY), **place)


def draw_efficiency(fig: Any, data: dict) -> None:
    """A line a row, named at its last point; dashed where responses are read singly."""
    known = {row: points for row, points in data.items() if points}
    last = max(n for points in known.values() for n, _ in points)
    ends = {row: points[-1][1] for row, points in known.items()}
    most = max(efficiency for points in known.values() for n, efficiency in points if n == last)
    (ax,) = panels(fig, f"with {last:,} rewards the best of these makes {most:.0%} of the gain")
    colours, heights = {"lire": BLUE, "dro": RED, "kto": GREEN, "rwr": ORANGE}, spread(ends, 0.055)
    for row, points in known.items():
        color = colours.get(row.split(",")[0], GRAY)
        ax.plot(*zip(*points), "o--" if row.endswith("single") else "o-", color=color)
        say(ax, row, (points[-1][0], heights[row]), color)
    ax.set(xscale="log", xlabel="N, scored responses", ylabel="efficiency")
    ax.set(ylim=(min(0, *ends.values()), 1))


# ------------------------------------------------------------------------------------- the figures


class Row(NamedTuple):
    """A figure: its lecture, its numbers, how they are drawn, what to see, and where it is from."""

    lecture: int
    data: Callable[[], Any]
    draw: Callable[[Any, Any], None]
    see: str
    source: str
    file: str = ""  # of results/, without .json: its figure is left out where that is not there


LECTURES = {1: "lists and LIRE", 2: "the optimum and DRO", 3: "what one measures"}
FIGURES = {
    "saturation": Row(
        1,
        largest_probs,
        draw_largest_probs,
        "Eight responses, none better than another: P prefers one of them by chance alone. A score "
        "is a sum, so its spread grows with the length, and at 128 tokens even T = 8 leaves one "
        "candidate more than half of P. Where one P is near 1, LIRE's gradient is near 0.",
        "P = softmax(s / T), `lire.candidate_probs` (Eq. 4); simulated, tokens of deviation 1.45.",
    ),
    "lengths": Row(
        1,
        probs_by_length,
        draw_probs_by_length,
        "One list with responses of 25 to 75 tokens, and tokens of the same mean in all of them. "
        "Under a sum each more token costs two nats, so the shortest takes most of P; under a mean "
        "P is near 1/8 for all. The short ones are a little ahead there: their means vary more.",
        "P = softmax(s / T), `lire.candidate_probs`, s a sum or a mean; T is 2 and 0.2.",
    ),
    "weights": Row(
        1,
        weights,
        draw_weights,
        "Two responses, w earns more than l; the margin is s_w - s_l, and s a log-prob (of DPO a "
        "log-ratio). The weight is -d loss / d s_w. DPO's tends to beta the worse the order is; "
        "LIRE's is largest at margin 0, tanh(gap / 2) / (4 T), and tends to 0 on both sides. "
        "T = 2, beta = 1/2, gap r_w - r_l = 2; each line is divided by its largest.",
        "`lire.lire_grad` of a list of two, and the gradient of `baselines.dpo_loss`.",
    ),
    "pool": Row(
        1,
        pool_rounds,
        draw_pool_rounds,
        "LIRE with four candidates on tiny, mean of three seeds; shares are of a round's pool, the "
        "reward is that at its end. Samples at temperature 0.2 and T = 2: the candidates of a list "
        "become one answer, most lists hold one single reward, and the policy earns no more. "
        "Samples at 1, T = 8 and an SFT term: they stay different for longer.",
        "Runs of `train.py` with POOL and POOLS, columns of log.jsonl: `docs/metrics.md`.",
    ),
    "optimum": Row(
        2,
        optima,
        draw_optima,
        "pi_ref = (0.5, 0.3, 0.2) times exp(r / tau), normalised. With a large tau pi* is the "
        "reference and V* its mean reward; with a small one pi* is the best response, and V* its "
        "reward.",
        "`dro.optimal_logps` and `dro.optimal_value` (Eq. 2).",
    ),
    "misprint": Row(
        2,
        descents,
        draw_descents,
        "Exact-expectation gradient descent on the three responses of the figure before, y from "
        "pi_ref, rate 1/2. The loss with tau/2 comes to pi* at both tau. With the 1/2 that the box "
        "of Algorithm 1 prints it stops beside pi* at tau 0.5, and diverges at tau 5. Below "
        "a millionth of a nat nothing is drawn.",
        "`dro.dro_v_losses`, which has tau/2, and `docs/maths.md`, section 3.",
    ),
    "memorised": Row(
        2,
        memorised,
        draw_memorised,
        "One logged response a prompt, and a policy that stays what it was: nothing is learnt "
        "about responses. residual/rms falls all the same, because V gives every prompt the number "
        "that it asks for. Within a prompt V cancels, and residual/within_prompt stays.",
        "A run of `train.py` with MEMORISE, columns of log.jsonl: `docs/metrics.md`.",
    ),
    "values": Row(
        2,
        values_in_training,
        draw_values,
        "A point is a held-out prompt. V starts near 0, climbs with the policy, and lies on V = V* "
        "when the policy is near pi*: both are learnt from one residual, on new samples of the "
        "policy every five updates or so. V* is exact, from all 584 responses. The rewards are in "
        "deviations of the first pool.",
        "Three runs of `train.py` with VALUES and UPDATES; V* by `dro.optimal_value`.",
    ),
    "dpo": Row(
        3,
        pair_logps,
        draw_pair_logps,
        "DPO sees the margin alone, so the chosen response may lose probability too (dotted: where "
        "it began). The first 50 updates on 60 pairs of samples at temperature 0.3; in longer runs "
        "on so few pairs the chosen ones come back, learnt by heart.",
        "A run of `train.py` with DPO, columns of log.jsonl; the loss is `baselines.dpo_loss`.",
    ),
    "plane": Row(
        3,
        plane,
        draw_plane,
        "Reward is half of the story: more of it can be had for more KL. The black line is the "
        "most that any policy earns at a KL. Each objective at its default strength, mean of the "
        "seeds; nearest is the largest efficiency.",
        "`results/compare.json`, of `python -m experiments.compare`.",
        "compare",
    ),
    "budget": Row(
        3,
        efficiency_by_size,
        draw_efficiency,
        "Efficiency is the share of the optimum's gain at the policy's own KL. Dashed: single "
        "responses; whole lines: lists of eight. Mean of the seeds; there is no point where "
        "a seed has no efficiency (docs/metrics.md says when): LIRE has no point at all.",
        "`results/budget.json`, of `python -m experiments.budget`.",
        "budget",
    ),
}


def is_there(name: str) -> bool:
    """Has a figure what it is drawn from?"""
    file = FIGURES[name].file
    return not file or (RESULTS / f"{file}.json").exists()


def caption(name: str) -> str:
    """What to see in a figure, and what made it, in Markdown."""
    row = FIGURES[name]
    numbers = f"`experiments.lecture_data.{row.data.__name__}`"
    made = f"Made by {numbers} and `experiments.lecture.{row.draw.__name__}`: {row.source}"
    wrap = lambda text: textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)
    return f"{wrap(row.see)}\n\n{wrap(made)}"


def captions() -> str:
    """The page of all figures that can be drawn."""
    lines, number = ["# Figures for three lectures", "", "`python -m experiments.lecture`"], 0
    lines += ["", "For lecturers: what is seen here answers some of the exercises."]
    for lecture, title in LECTURES.items():
        lines += ["", f"## Lecture {lecture}: {title}"]
        for name in FIGURES:
            if FIGURES[name].lecture == lecture and is_there(name):
                number += 1
                lines += ["", f"### {number}. {name}", "", f"![{name}]({name}.png)", ""]
                lines += [caption(name)]
    return "\n".join(lines) + "\n"


def draw(name: str, data: Any, path: Path) -> int:
    """Draw a figure from its numbers.

    Returns: bytes. Raises: ImportError without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        fig = Figure(figsize=SIZE, dpi=DPI)
        FigureCanvasAgg(fig)
        FIGURES[name].draw(fig, data)
        return write_picture(fig, path)


def main(name: str = "", out: str = "out/lecture") -> None:
    """Draw one figure or all, and print the captions; of all, captions.md is written too.

    Raises: ConfigError at an unknown name.
    """
    if name and name not in FIGURES:
        raise ConfigError(f"no figure {name!r}: choose from {', '.join(FIGURES)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if not name:
        save(captions(), folder / "captions.md")
    try:
        import matplotlib
    except ImportError:
        print("no pictures of the lectures: pip install matplotlib draws it")
        return
    matplotlib.use("Agg")
    for own in [name] if name else FIGURES:
        file = FIGURES[own].file
        if not is_there(own):
            print(f"{own} is left out: python -m experiments.{file} makes results/{file}.json")
            continue
        size = draw(own, FIGURES[own].data(), folder / f"{own}.png")
        print(f"{folder / own}.png, {size / 1000:.0f} KB\n{caption(own)}\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--out", default="out/lecture", help="folder of the pictures")
    run_script("lecture", lambda: main(**vars(parser.parse_args())))
