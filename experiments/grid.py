"""Learning rate and strength of every objective: the defaults are the rows of most reward here.

    python -m experiments.grid        an hour on two cores

Every objective begins in the middle of RATES and of its ladder (experiments.compare), with the
rows beside that (one rate or one strength away), and goes on from its best row to the rows beside
it, until none is better: so a best row has neighbours on all sides, or is at the end of a ladder.
Judged by the reward of its samples on training prompts, each policy with the reference alone; rows
that failed or collapsed are out. One seed, 200 updates, rounds as the objective has them by
default. Writes results/grid.json, .csv, .txt.
"""

import argparse
from pathlib import Path

from experiments.cells import run_cells, write_results
from experiments.compare import COMMON, LADDERS, as_csv, plane, table
from harness.run import run_script
from train import Config

RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
Place = tuple[int, int]  # of a row: index of its rate, of its strength


def settings_of(objective: str, place: Place) -> dict:
    """The settings of a row."""
    name, values = LADDERS[objective]
    return {"objective": objective, name: values[place[1]], "lr": RATES[place[0]]}


def beside(objective: str, place: Place) -> list[Place]:
    """The rows one rate or one strength away, where there are such."""
    i, j = place
    sizes = len(RATES), len(LADDERS[objective][1])
    around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
    return [row for row in around if all(0 <= k < size for k, size in zip(row, sizes))]


def first_places(objective: str) -> list[Place]:
    """The row in the middle and those beside it."""
    middle = len(RATES) // 2, len(LADDERS[objective][1]) // 2
    return [middle, *beside(objective, middle)]


def score(metrics: dict) -> float:
    """What a row is judged by."""
    out = metrics.get("failed") or metrics["collapsed"]
    return float("-inf") if out else metrics["policy_reward"]


def best_place(tried: dict[Place, dict]) -> Place:
    """The row of most reward, of its metrics by place."""
    return max(tried, key=lambda place: score(tried[place]))


def beside_the_best(objective: str, tried: dict[Place, dict]) -> list[Place]:
    """The rows beside the best one that have not been tried; none where the search is over."""
    return [place for place in beside(objective, best_place(tried)) if place not in tried]


def main(task: str = "dialogue", jobs: int = 0) -> dict[str, dict]:
    """Search, print and write what was tried.

    Returns: the settings of the best row of each objective.
    """
    common = {k: v for k, v in COMMON.items() if k != "evolve"} | {"task": task}
    tried: dict[str, dict[Place, dict]] = {objective: {} for objective in LADDERS}
    todo = {objective: first_places(objective) for objective in LADDERS}
    references = []
    while any(todo.values()):
        configs = {
            (objective, place): Config(**common, **settings_of(objective, place))
            for objective, places in todo.items()
            for place in places
        }
        run_cells(list(configs.values()), jobs)
        for (objective, place), c in configs.items():
            found, _, reference = plane({"": c}, "train", common["eval_samples"])
            tried[objective][place] = found.get("", {"failed": True})
            references += [reference] * bool(reference)
        todo = {objective: beside_the_best(objective, tried[objective]) for objective in LADDERS}

    rows, best = {}, {}
    for objective, metrics in tried.items():
        best[objective] = settings_of(objective, best_place(metrics))
        for place in sorted(metrics):
            words = [f"{name} {value}" for name, value in settings_of(objective, place).items()]
            row = ", ".join([objective, *words[1:]]) + " *" * (place == best_place(metrics))
            rows[row] = [metrics[place]]
    results = {"settings": common, "reference": references[:1], "rows": rows, "best": best}
    path = Path("results") / "-".join(["grid", *([task] if task != "dialogue" else [])])
    option = f" --task {task}" if task != "dialogue" else ""
    write_results(path.name, f"python -m experiments.grid{option}", results)
    Path(f"{path}.csv").write_text(as_csv(results))
    Path(f"{path}.txt").write_text(table(results) + "\n")
    print(f"\n{table(results)}\n\nmost reward on training prompts:")
    print("\n".join(map(str, best.values())))
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="dialogue")
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (0: one a core)")
    run_script("grid", lambda: main(**vars(parser.parse_args())))
