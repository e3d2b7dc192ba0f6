"""Tables of runs: `python -m experiments.tables NAME` prints one and writes results/NAME.json.

sft         dialogue with and without the SFT term, defaults and authors' T   5 seeds
summary     summary with the defaults; trained on shuffled prompts            3 seeds
candidates  M = 2, 4, 8, 16 candidates a prompt                               3 seeds
evolve      1, 2, 3, 5 Evolve rounds at the same number of updates            3 seeds
objective   the authors' T, rewards and score against others                  3 seeds
shuffled    dialogue trained on shuffled prompts                              3 seeds
dro         DRO and KTO on dialogue: reference samples, pools of the policy   5 seeds
dro-t5      reference samples on the T5                                       5 seeds
dro-logged  the same on the task's own logged responses                       5 seeds
dro-ablations   DRO's tau, value network and learning rates                   3 seeds
"""

import argparse
import statistics
from typing import Any, NamedTuple

from experiments.cells import run_cells, write_results
from harness.run import run_script
from train import Config

LIRE_COLUMNS = """
    policy_reward reference_reward best_of_8_reward win_rate kl efficiency ood_policy_reward
    ood_reference_reward ood_best_of_8_reward policy_distinct
""".split()
DRO_COLUMNS = """
    policy_reward reference_reward win_rate kl efficiency value_error value_correlation
    ood_policy_reward ood_efficiency
""".split()
SUMMARY_COLUMNS = """
    policy_reward reference_reward best_of_8_reward win_rate kl policy_covered reference_covered
    policy_invented reference_invented policy_words reference_words ood_policy_reward
    ood_reference_reward
""".split()


class Table(NamedTuple):
    """What a table shows of which runs."""

    columns: list[str]
    seeds: int
    rows: dict[str, dict]  # row -> its settings


def rows(settings: dict[str, dict], **common: Any) -> dict[str, dict]:
    """The same rows under common settings; a row's own win."""
    return {row: {**common, **own} for row, own in settings.items()}


AUTHORS = {"temperature": 2.0, "lr": 5e-4}  # LIRE's T in its paper, and a rate that suits it here
DRO_ROWS = rows(
    {f"dro, tau {tau}": {"tau": tau} for tau in (0.5, 0.2)}, objective="dro", evolve=1, lr=5e-4
)
DRO_POOLS = {
    f"{row}, --evolve 10 --lr 1e-3": {**settings, "evolve": 10, "lr": 1e-3}
    for row, settings in DRO_ROWS.items()
}
KTO_ROWS = rows(
    {f"kto, beta {beta:g}": {"beta": beta} for beta in (0.2, 1.0, 5.0)},
    objective="kto",
    evolve=1,
    lr=5e-4,
)
ABLATIONS = {
    **{f"tau {tau}": {"tau": tau} for tau in (0.2, 0.5, 1.0, 5.0)},
    "V per batch": {"value": "batch"},
    "shared": {"share_networks": True},
    "shared, V per batch": {"share_networks": True, "value": "batch"},
    **{f"both lr x {k:g}": {"lr": k * 5e-4} for k in (0.25, 4)},
    **{f"value lr x {k:g}": {"value_lr": k * 5e-4} for k in (0.25, 4)},
}
TABLES = {
    "sft": Table(
        LIRE_COLUMNS,
        5,
        {
            "defaults (T 16, lr 1e-3, sft_weight 0.1)": {},
            "T 16, lr 1e-3, sft_weight 0": {"sft_weight": 0.0},
            "T 2, lr 5e-4, sft_weight 0.1": AUTHORS,
            "T 2, lr 5e-4, sft_weight 0": {**AUTHORS, "sft_weight": 0.0},
        },
    ),
    "evolve": Table(
        LIRE_COLUMNS,
        3,
        rows({f"{n} round{'s' * (n > 1)}": {"evolve": n} for n in (1, 2, 3, 5)}, **AUTHORS),
    ),
    "candidates": Table(
        LIRE_COLUMNS, 3, rows({f"M = {M}": {"candidates": M} for M in (2, 4, 8, 16)}, **AUTHORS)
    ),
    "objective": Table(
        LIRE_COLUMNS,
        3,
        rows(
            {
                "T 2, sums, softmax rewards": {},
                "T 1": {"temperature": 1.0},
                "T 4": {"temperature": 4.0},
                "rewards as they are": {"reward_norm": "none"},
                "rewards z-scored in the list": {"reward_norm": "zscore"},
                "mean score": {"score": "mean"},
            },
            **AUTHORS,
        ),
    ),
    "summary": Table(
        SUMMARY_COLUMNS,
        3,
        rows(
            {
                "defaults": {},
                "T 2, lr 5e-4": AUTHORS,
                "defaults, trained on shuffled prompts": {"shuffle_prompts": True},
            },
            task="summary",
        ),
    ),
    "shuffled": Table(
        LIRE_COLUMNS,
        3,
        rows(
            {"its own prompts": {}, "trained on shuffled prompts": {"shuffle_prompts": True}},
            **AUTHORS,
        ),
    ),
    "dro": Table(DRO_COLUMNS, 5, {**DRO_ROWS, **DRO_POOLS, **KTO_ROWS}),
    "dro-t5": Table(DRO_COLUMNS, 5, rows({**DRO_ROWS, **KTO_ROWS}, model="t5")),
    "dro-logged": Table(
        DRO_COLUMNS,
        5,
        {row: {**own, "evolve": 0} for row, own in {**DRO_ROWS, **KTO_ROWS}.items()},
    ),
    "dro-ablations": Table(
        DRO_COLUMNS, 3, rows(ABLATIONS, objective="dro", tau=0.5, evolve=1, lr=5e-4)
    ),
}


def mean_and_spread(values: list[float | None]) -> str:
    """Mean and standard deviation over seeds; - where a value is missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.2f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.2f}"
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def table(name: str, results: dict[str, list[dict]]) -> str:
    """The table in Markdown, from the results in results/NAME.json: metrics of each row's seeds."""
    columns = TABLES[name].columns
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row, seeds in results.items():
        cells = [mean_and_spread([m.get(column) for m in seeds]) for column in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(name: str, jobs: int = 0) -> None:
    """Run or find the cells of a table, print it, write results/NAME.json."""
    _, seeds, rows = TABLES[name]
    configs = [Config(**own, seed=seed) for own in rows.values() for seed in range(seeds)]
    metrics = run_cells(configs, jobs)
    results = {row: metrics[i * seeds : (i + 1) * seeds] for i, row in enumerate(rows)}
    write_results(name, f"python -m experiments.tables {name}", results)
    print(f"\nmean ± standard deviation over {seeds} seeds\n\n{table(name, results)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (0: one a core)")
    run_script("tables", lambda: main(**vars(parser.parse_args())))
