"""LIRE, and DRO on the T5, on real human-rated explanations (COPA-SSE), by 5 folds over prompts:

    python -m experiments.copa dev-explained.jsonl

Every list is scored by a model that was not trained on its prompt. Settings were chosen on training
prompts of the default split alone. Prints a table with 95 % intervals (1,000 bootstrap draws over
prompts) and writes results/copa.json.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

import data
from experiments.cells import folder_of, run_cells, write_results
from harness.evaluation import list_outcome
from harness.run import run_script, save
from train import Config

FOLDS = 5
COMMON = {"reference_steps": 150, "steps": 60, "lr": 5e-4, "eval_every": 60, "eval_prompts": 16}
ROWS = {
    "--score mean --temperature 0.2": {"score": "mean", "temperature": 0.2, "sft_weight": 0.0},
    "--score sum --temperature 2": {"temperature": 2.0},
    "--objective dro --model t5 --tau 0.2": {"objective": "dro", "model": "t5", "tau": 0.2},
}


def fold_files(records: list[dict], folder: Path) -> list[tuple[str, str]]:
    """(train file, held-out file) of each fold; prompts are dealt out by a hash of their text."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = [hashlib.sha256(r["prompt"].encode()).hexdigest() for r in records]
    sides = [int(digest[:8], 16) % FOLDS for digest in digests]
    parts = [[r for r, side in zip(records, sides) if side == k] for k in range(FOLDS)]
    files = []
    for k, held in enumerate(parts):
        kept = [r for part in parts[:k] + parts[k + 1 :] for r in part]
        pair = [str(folder / f"{k}-{side}.jsonl") for side in ("train", "heldout")]
        for path, rows in zip(pair, (kept, held)):
            save("".join(json.dumps(r) + "\n" for r in rows), path)
        files.append(tuple(pair))
    return files


def interval(
    top: np.ndarray, right: np.ndarray, pairs: np.ndarray, draws: np.ndarray
) -> dict[str, list[float]]:
    """Mean top-1 reward and pair accuracy over prompts, with 95 % bootstrap intervals."""
    accuracies = right[draws].sum(1) / pairs[draws].sum(1)
    values = {"top1_reward": top[draws].mean(1), "pair_accuracy": accuracies}
    means = {"top1_reward": top.mean(), "pair_accuracy": right.sum() / pairs.sum()}
    return {
        k: [float(means[k]), *map(float, np.percentile(v, [2.5, 97.5]))] for k, v in values.items()
    }


def paired(one: np.ndarray, other: np.ndarray, draws: np.ndarray) -> dict[str, list[float]]:
    """The difference of two scores on the same lists, with 95 % bootstrap intervals."""

    def difference(rows):
        return {
            "top1_reward": (one[0] - other[0])[rows].mean(-1),
            "pair_accuracy": (one[1] - other[1])[rows].sum(-1) / one[2][rows].sum(-1),
        }

    whole, drawn = difference(np.arange(one.shape[1])), difference(draws)
    return {k: [float(whole[k]), *map(float, np.percentile(drawn[k], [2.5, 97.5]))] for k in whole}


def table(scores: dict[str, dict]) -> str:
    """The table in Markdown: mean [95 % interval] of every score."""
    lines = ["| score | top1_reward | pair_accuracy |", "|---|---|---|"]
    for score, metrics in scores.items():
        names = ("top1_reward", "pair_accuracy")
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(*metrics[k]) if k in metrics else "" for k in names
        ]
        lines.append(f"| {score} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main(path: str, jobs: int = 0) -> dict:
    """Run or find the cells, print the tables, write results/copa.json.

    Returns: what is written.
    """
    records = data.load([path])
    files = fold_files(records, Path("out/copa"))
    configs = {
        row: [Config(data=[train], eval_data=[held], **COMMON, **own) for train, held in files]
        for row, own in ROWS.items()
    }
    # Row by row: up to five cells at a time never share a reference.
    run_cells([c for folds in configs.values() for c in folds], jobs)
    results = {}
    for row, folds in configs.items():
        texts = [(folder_of(c) / "heldout.jsonl").read_text() for c in folds]
        lists = [json.loads(line) for text in texts for line in text.splitlines()]
        draws = np.random.default_rng(0).integers(len(lists), size=(1000, len(lists)))
        # [3, lists] each.
        outcomes = {
            score: np.array([list_outcome(r[score], r["rewards"]) for r in lists]).T
            for score in list(lists[0])[2:]
        }
        results[row] = {score: interval(*outcome, draws) for score, outcome in outcomes.items()}
        for score in ("policy_sum", "policy_mean", "policy_ratio"):  # differences, prompt by prompt
            for other in ("longest", score.replace("policy", "reference")):
                if other in outcomes:
                    gain = paired(outcomes[score], outcomes[other], draws)
                    results[row][f"{score} - {other}"] = gain
    write_results("copa", "python -m experiments.copa dev-explained.jsonl", results)
    for row, scores in results.items():
        print(f"\n{row}: {len(records)} prompts, {FOLDS} folds\n\n{table(scores)}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="dev-explained.jsonl of COPA-SSE, or canonical records")
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (0: one a core)")
    run_script("copa", lambda: main(**vars(parser.parse_args())))
