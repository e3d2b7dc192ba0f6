"""The README's tables: `python -m experiments.tables NAME` prints one and writes results/NAME.json.

sft         dialogue with and without the SFT term, defaults and authors' T   5 seeds
summary     summary with the defaults; trained on shuffled prompts            3 seeds
candidates  M = 2, 4, 8, 16 candidates a prompt                               3 seeds
evolve      1, 2, 3, 5 Evolve rounds at the same number of updates            3 seeds
objective   the authors' T, rewards and score against others                  3 seeds
shuffled    dialogue trained on shuffled prompts                              3 seeds
dro         DRO and KTO on dialogue: reference samples, pools of the policy   5 seeds
dro-t5      reference samples on the T5                                       5 seeds
dro-logged  the same on the task's own logged responses                       5 seeds
dro-tried   DRO at tau 0.5: what brings it nearer to the optimum              1 seed
dro-ablations   DRO's tau, value network and learning rates                   3 seeds
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

from experiments import cells
from train import Config, command_line

COLUMNS = (
    "policy_reward reference_reward best_of_8_reward win_rate kl efficiency ood_policy_reward ood_reference_reward "
    "ood_best_of_8_reward policy_distinct"
).split()
DRO = "policy_reward reference_reward win_rate kl efficiency value_error value_correlation ood_policy_reward ood_efficiency".split()
SUMMARY = (
    "policy_reward reference_reward best_of_8_reward win_rate kl policy_covered reference_covered policy_invented "
    "reference_invented policy_words reference_words ood_policy_reward ood_reference_reward"
).split()


def of(rows: dict, **common) -> dict:
    """The same rows under common settings; a row's own win."""
    return {row: {**common, **settings} for row, settings in rows.items()}


AUTHORS = {"temperature": 2.0, "lr": 5e-4}  # LIRE's T in its paper, and a rate that suits it here
DRO_ROWS = of(
    {f"dro, tau {tau}": {"tau": tau} for tau in (0.5, 0.2)}, objective="dro", evolve=1, lr=5e-4
)
DRO_POOLS = {
    f"{row}, --evolve 10 --lr 1e-3": {**settings, "evolve": 10, "lr": 1e-3}
    for row, settings in DRO_ROWS.items()
}
TRIED = """
--lr 2e-3
--lr 2e-4
--lr 1e-4 --value-lr 5e-4
--sample-temperature 1.4
--clip 10 --candidates 32
--clip 10 --candidates 32 --optimizer adafactor --lr 1e-3
--clip 10 --candidates 32 --reference-lr 2e-3
--behaviour reference --evolve 5
--behaviour reference --evolve 5 --candidates 32 --lr 1e-3 --sample-temperature 1.25
--behaviour reference --evolve 5 --candidates 32 --lr 1e-3 --sample-temperature 1.5
--behaviour reference --evolve 8 --candidates 32 --lr 1e-3 --steps 1600
--evolve 5
--evolve 10 --lr 1e-3
--evolve 16 --candidates 16 --lr 1e-3 --steps 1200"""
KTO_ROWS = of(
    {f"kto, beta {beta:g}": {"beta": beta} for beta in (0.2, 1.0, 5.0)},
    objective="kto",
    evolve=1,
    lr=5e-4,
)

TABLES = {  # name -> (columns, seeds, {row: settings})
    "sft": (
        COLUMNS,
        5,
        {
            "defaults (T 4, lr 1e-3, sft_weight 0.1)": {},
            "T 4, lr 1e-3, sft_weight 0": {"sft_weight": 0.0},
            "T 2, lr 5e-4, sft_weight 0.1": AUTHORS,
            "T 2, lr 5e-4, sft_weight 0": {**AUTHORS, "sft_weight": 0.0},
        },
    ),
    "summary": (
        SUMMARY,
        3,
        of(
            {
                "defaults": {},
                "T 2, lr 5e-4": AUTHORS,
                "defaults, trained on shuffled prompts": {"shuffle_prompts": True},
            },
            task="summary",
        ),
    ),
    "candidates": (
        COLUMNS,
        3,
        of({f"M = {M}": {"candidates": M} for M in (2, 4, 8, 16)}, **AUTHORS),
    ),
    "evolve": (
        COLUMNS,
        3,
        of({f"{n} round{'s' * (n > 1)}": {"evolve": n} for n in (1, 2, 3, 5)}, **AUTHORS),
    ),
    "objective": (
        COLUMNS,
        3,
        of(
            {
                "T 2, sums, softmax rewards": {},
                "T 1": {"temperature": 1.0},
                "T 4": {"temperature": 4.0},
                "rewards as they are": {"reward_norm": "none"},
                "rewards z-scored in the list": {"reward_norm": "list-zscore"},
                "mean score": {"score": "mean"},
            },
            **AUTHORS,
        ),
    ),
    "dro": (DRO, 5, {**DRO_ROWS, **DRO_POOLS, **KTO_ROWS}),
    "dro-t5": (DRO, 5, of({**DRO_ROWS, **KTO_ROWS}, model="t5")),
    "dro-logged": (
        DRO,
        5,
        {row: {**settings, "evolve": 0} for row, settings in {**DRO_ROWS, **KTO_ROWS}.items()},
    ),
    "dro-tried": (
        DRO,
        1,
        {
            f"`{row}`" if row else "defaults": dataclasses.asdict(
                command_line(f"--objective dro --tau 0.5 --evolve 1 --lr 5e-4 {row}".split())
            )
            for row in TRIED.split("\n")
        },
    ),
    "dro-ablations": (
        DRO,
        3,
        of(
            {
                **{f"tau {tau}": {"tau": tau} for tau in (0.2, 0.5, 1.0, 5.0)},
                "V per batch": {"value": "batch"},
                "shared": {"share_networks": True},
                "shared, V per batch": {"share_networks": True, "value": "batch"},
                **{f"both lr x {k:g}": {"lr": k * 5e-4} for k in (0.25, 4)},
                **{f"value lr x {k:g}": {"value_lr": k * 5e-4} for k in (0.25, 4)},
            },
            objective="dro",
            tau=0.5,
            evolve=1,
            lr=5e-4,
        ),
    ),
    "shuffled": (
        COLUMNS,
        3,
        of(
            {"its own prompts": {}, "trained on shuffled prompts": {"shuffle_prompts": True}},
            **AUTHORS,
        ),
    ),
}


def mean_and_spread(values) -> str:
    """mean and standard deviation over seeds; - where a value is missing."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.2f}" + (
        f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    )
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def table(name: str, results: dict) -> str:
    """The table in Markdown, from the rows of results/NAME.json."""
    columns, seeds, _ = TABLES[name]
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row, found in results.items():
        lines.append(
            f"| {row} | "
            + " | ".join(mean_and_spread([m.get(column) for m in found]) for column in columns)
            + " |"
        )
    return "\n".join(lines)


def main(name: str, jobs: int = 0) -> None:
    _, seeds, rows = TABLES[name]
    configs = [
        (row, Config(**{**settings, "seed": seed}))
        for row, settings in rows.items()
        for seed in range(seeds)
    ]
    metrics = cells.run([c for _, c in configs], jobs)
    results = {row: [m for (other, _), m in zip(configs, metrics) if other == row] for row in rows}
    Path("results").mkdir(exist_ok=True)
    Path(f"results/{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nmean ± standard deviation over {seeds} seeds\n\n{table(name, results)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (default: one a core)")
    args = parser.parse_args()
    main(args.name, args.jobs)
