"""Tables of runs: `python -m experiments.tables NAME` prints one and writes results/NAME.json.

lire           rounds, SFT term, the authors' T, the mean score, shuffled prompts   3 seeds
candidates     M = 2, 4, 8, 16 candidates a prompt                                  3 seeds
summary        the second world, and trained on shuffled prompts                    3 seeds
dro            DRO-V offline on GPT and T5; on the task's own logged answers        5 seeds
dro-ablations  DRO's tau and value network, 250 updates                             3 seeds
"""

import argparse
import statistics
from typing import Any, NamedTuple

from experiments.cells import run_cells, write_results
from harness.run import run_script
from train import Config

LIRE_COLUMNS = """
    policy_reward reference_reward best_of_8_reward win_rate kl efficiency ood_policy_reward
    policy_distinct policy_broken lists_tied
""".split()
DRO_COLUMNS = """
    policy_reward reference_reward win_rate kl optimum_kl efficiency kl_from_optimum value_error
    value_correlation policy_broken ood_policy_reward ood_efficiency
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


OFFLINE = {"evolve": 1}
AUTHORS = {"temperature": 2.0, "lr": 5e-4}  # LIRE's T in its paper, and a rate that suits it here
ABLATIONS = {
    **{f"tau {tau}": {"tau": tau} for tau in (0.2, 0.5, 1.0, 5.0)},
    "V per batch": {"value": "batch"},
    "shared": {"share_networks": True},
    "shared, V per batch": {"share_networks": True, "value": "batch"},
}
TABLES = {
    "lire": Table(
        LIRE_COLUMNS,
        3,
        {
            "10 rounds, the default": {},
            "5 rounds": {"evolve": 5},
            "2 rounds": {"evolve": 2},
            "1 round: offline": OFFLINE,
            "10 rounds without the SFT term": {"sft_weight": 0.0},
            "offline without the SFT term": {**OFFLINE, "sft_weight": 0.0},
            "the authors' T, 2, at lr 5e-4": AUTHORS,
            "means per token, T 0.5": {"score": "mean", "temperature": 0.5},
            "trained on shuffled prompts": {"shuffle_prompts": True},
        },
    ),
    "candidates": Table(
        LIRE_COLUMNS, 3, rows({f"M = {M}": {"candidates": M} for M in (2, 4, 8, 16)})
    ),
    "summary": Table(
        SUMMARY_COLUMNS,
        3,
        rows(
            {"defaults": {}, "trained on shuffled prompts": {"shuffle_prompts": True}},
            task="summary",
        ),
    ),
    "dro": Table(
        DRO_COLUMNS,
        5,
        rows(
            {
                "GPT, samples of the reference": {},
                "T5, samples of the reference": {"model": "t5"},
                "GPT, logged answers": {"evolve": 0},
            },
            objective="dro",
            tau=0.5,
        ),
    ),
    "dro-ablations": Table(
        DRO_COLUMNS, 3, rows(ABLATIONS, objective="dro", tau=0.5, lr=5e-4, steps=250, iterate=1)
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
