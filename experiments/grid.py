"""Learning rate and strength of every objective: the defaults are the rows of most reward here.

    python -m experiments.grid        an hour on two cores

Every objective begins in the middle of RATES and of its ladder (experiments.compare), with the
rows beside that (one rate or one strength away), and goes on from its best row to the rows beside
it, until none is better: so a best row has neighbours on all sides, or is at the end of a ladder.
A row counts as much as it earns or as the row of twice its rate does, whichever is less: a default
beside an edge would be one that another seed falls over. Judged by the reward of its samples on
training prompts, each policy with the reference alone; what failed or collapsed earns nothing. One
seed, 200 updates, rounds as the objective has them by default. Writes results/grid.json, .csv,
.txt.
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


def earned(metrics: dict | None) -> float:
    """The reward of a row; -inf where it failed, collapsed or has not been tried."""
    out = metrics is None or metrics.get("failed") or metrics["collapsed"]
    return float("-inf") if out else metrics["policy_reward"]


def counts(place: Place, tried: dict[Place, dict]) -> float:
    """What a row counts: the least that it and the row of twice its rate earn."""
    i, j = place
    return min(earned(tried.get(place)), earned(tried.get((i + 1, j))))


def best_place(tried: dict[Place, dict]) -> Place:
    """The row that counts most, of the rows' metrics by place; at a tie the one that earns more."""
    return max(tried, key=lambda place: (counts(place, tried), earned(tried[place])))


def to_try(objective: str, tried: dict[Place, dict]) -> list[Place]:
    """The rows that may be better than the best one; none where the search is over.

    They are those beside it, and those of twice the rate of rows that earn more than it counts.
    """
    best = best_place(tried)
    more = [(i, j) for i, j in tried if earned(tried[i, j]) > counts(best, tried)]
    doubles = [(i + 1, j) for i, j in more if i + 1 < len(RATES)]
    return [
        place for place in dict.fromkeys(beside(objective, best) + doubles) if place not in tried
    ]


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
        todo = {objective: to_try(objective, tried[objective]) for objective in LADDERS}

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
    print(f"\n{table(results)}\n\nbest on training prompts:")
    print("\n".join(map(str, best.values())))
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="dialogue")
    parser.add_argument("--jobs", type=int, default=0, help="cells at a time (0: one a core)")
    run_script("grid", lambda: main(**vars(parser.parse_args())))
