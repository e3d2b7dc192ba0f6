"""Every table on one page: `python -m experiments.report` writes results/README.md.

A result is a file results/NAME.json and a row of SECTIONS: its title and how to read it. The
numbers are the file's, and so are the command that made them and its date.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import bench, compare, copa, exact, tables

RESULTS = Path(__file__).parent.parent / "results"


class Section(NamedTuple):
    """What the page says of a result: title, how to read it, and what makes its table."""

    title: str
    reading: str
    table: Callable[[Any], str] | None = None  # None: a table of experiments.tables


def copa_tables(results: dict[str, dict]) -> str:
    """A table for each setting."""
    return "\n\n".join(f"`{row}`\n\n{copa.table(own)}" for row, own in results.items())


SECTIONS = {
    "compare": Section(
        "Every objective side by side: dialogue, held-out prompts, 3 seeds",
        "PRO, LIRE and RRHF earn the same within the spread; DRO earns less than all but KTO, and "
        "at tau 0.5 it is the one that makes 80 % of the optimum's gain for 0.75 nats.\n\n![Every "
        "objective on the reward-KL plane](compare.png)",
        compare.table,
    ),
    "compare-evolve1": Section(
        "Everyone offline, on the first pool alone: one seed",
        "LIRE earns most, 6.75 where five rounds bring 9.21; PRO and RRHF are nearest to the "
        "optimum; DPO and IPO collapse with the weak penalties that five rounds of new samples "
        "forgave.",
        compare.table,
    ),
    "grid": Section(
        "The grid that the defaults come from: 3 learning rates x 3 strengths, training prompts, "
        "one seed",
        "The row of most reward is the default of its objective; eight of nine chose the highest "
        "rate, and RRHF, SLiC and PRO the largest SFT weight, so a wider grid may find more.",
        compare.table,
    ),
    "sft": Section(
        "LIRE on dialogue: the SFT term, 5 seeds",
        "The defaults make 96 % of the gain that the optimum makes at their KL; with the authors' "
        "T = 2 and without the SFT term one seed of five collapses (reward 5.0 at 31 nats).",
    ),
    "evolve": Section(
        "LIRE: rounds at the same number of updates, T = 2, lr 5e-4, 3 seeds",
        "One round, the offline setting, drifts off the language and earns less than the best of "
        "8; a pool drawn anew shows the policy its own mistakes.",
    ),
    "candidates": Section(
        "LIRE: candidates a prompt, T = 2, lr 5e-4, 3 seeds",
        "More candidates help, most of all the step from 2 to 4.",
    ),
    "objective": Section(
        "LIRE: the authors' T, rewards and score against others, lr 5e-4, 3 seeds",
        "A higher T or the mean score, which both keep the listwise softmax from saturating, do "
        "better than the authors' T = 2 with sums.",
    ),
    "summary": Section(
        "LIRE on summary, 3 seeds",
        "The reward rises, but not to the best of 8; trained on shuffled prompts nothing of the "
        "gain is left.",
    ),
    "shuffled": Section(
        "LIRE on dialogue, trained on shuffled prompts: the control, T = 2, lr 5e-4, 3 seeds",
        "An answer has to name its subject, so a policy that learns from other prompts' lists "
        "earns nothing.",
    ),
    "dro": Section(
        "DRO and KTO on samples of the reference (offline), and DRO on pools of its own: dialogue, "
        "5 seeds",
        "Offline, DRO makes 57 % of the optimum's gain at tau 0.5, and at tau 0.2 its KL runs "
        "away; with ten pools of the policy's own and twice the rate it makes 87 % and 95 %.",
    ),
    "dro-t5": Section(
        "DRO and KTO on the T5, samples of the reference, 5 seeds",
        "As on the GPT: no objective here reaches the optimum offline.",
    ),
    "dro-logged": Section(
        "DRO and KTO on the task's logged responses, which no model chose, 5 seeds",
        "Four responses a prompt, of a distribution that the reference only approximates: both "
        "gain less, DRO less than KTO.",
    ),
    "dro-ablations": Section(
        "DRO: the paper's ablations at tau 0.5, lr 5e-4, samples of the reference, 3 seeds",
        "One value per prompt with a network of its own is best, as in the paper (efficiency "
        "0.54; V per batch 0.39 and shared 0.43, where they are defined at all); a faster value "
        "network helps a little, as in the paper (0.44, 0.54, 0.58); tau 1 is nearer to the "
        "optimum (0.65) at less reward; the highest rate is worst, which the paper did not find.",
    ),
    "exact": Section(
        "DRO-V against the exact optimum, real networks, tiny",
        "With one prompt GPT and T5 come to pi* for every tau; with four the same number of steps "
        "leaves 0.0006 to 0.009 nats; the coefficient 1/2 that the box of Algorithm 1 prints ends "
        "elsewhere (tau 0.5) or diverges (tau 5).",
        exact.table,
    ),
    "copa": Section(
        "Real ratings: COPA-SSE, 1,000 prompts with 6,579 rated explanations, 5 folds",
        'By its mean log-prob LIRE beats the reference clearly (+0.58) and not the rule "pick the '
        'longest" (-0.03): raters liked long explanations. Brackets are 95 % bootstrap intervals '
        "over prompts, differences are paired.",
        copa_tables,
    ),
    "bench": Section(
        "A prompt is read once: an update with M responses, against the prompt repeated M times",
        "At least 90 % of what the token ratio promises is reached and, where repeated prompts no "
        "longer fit the caches, more than all of it.",
        bench.table,
    ),
}


def report() -> str:
    """The page."""
    lines = [
        "# Results",
        "",
        "Written by `python -m experiments.report` from the files beside it. Two cores of an "
        "Intel Xeon, torch 2.13.0 (CPU). Rewards are the task's own, of held-out prompts unless "
        "said; ± is the standard deviation over seeds, - a number that would mean nothing "
        "(docs/metrics.md).",
        "",
    ]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        make = section.table or functools.partial(tables.table, name)
        lines += [
            f"## {section.title}",
            "",
            f"`{content['command']}`, {content['date']}. {section.reading}",
            "",
            make(content["results"]),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    path = RESULTS / "README.md"
    path.write_text(report())
    print(f"written to {path}")
