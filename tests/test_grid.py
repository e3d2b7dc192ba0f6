"""The grid that the defaults come from: its search, its rows, what it writes."""

import json

import pytest
from helpers import ROOT

from experiments import compare, grid
from harness.config import Config, resolve
from objectives import OBJECTIVES

TRAINED = {name for name, row in OBJECTIVES.items() if row.loss}


def metrics(reward, **alarms):
    known = {name: 1.0 for name in compare.COLUMNS} | {"collapsed": False}
    return known | {"policy_reward": reward} | alarms


def test_everyone_begins_with_the_same_five_rows_of_settings_that_exist():
    assert set(compare.LADDERS) == TRAINED
    for objective, (_, values) in compare.LADDERS.items():
        assert len(values) == len(compare.LADDERS["lire"][1]) and len(set(values)) == len(values)
        places = grid.first_places(objective)
        assert len(set(places)) == 5 and places == grid.first_places("lire")
        for place in places:
            resolve(Config(**grid.settings_of(objective, place)))
            assert grid.settings_of(objective, place)["lr"] == grid.RATES[place[0]]


def test_a_row_counts_what_it_and_the_row_of_twice_its_rate_earn_at_least():
    tried = {(2, 1): metrics(3.0), (3, 1): metrics(5.0), (4, 1): metrics(4.0), (2, 0): metrics(9.0)}
    assert [grid.counts(place, tried) for place in tried] == [
        3.0,
        4.0,
        float("-inf"),
        float("-inf"),
    ]
    assert grid.best_place(tried) == (3, 1)
    for out in ({"failed": "loss is inf"}, metrics(4.5, collapsed=True)):
        assert grid.best_place(tried | {(4, 1): out}) == (2, 1)


def test_the_search_goes_on_beside_the_best_row_until_nothing_beside_it_is_new():
    tried = {place: metrics(0.0) for place in grid.first_places("dpo")}
    (i, j) = edge = max(tried)  # the highest rate, the middle strength
    tried[edge] = metrics(5.0)
    # Nothing counts more than 0 yet, and the row at the edge might: its double is to be tried.
    assert (i + 1, j) in grid.to_try("dpo", tried)
    tried[i + 1, j] = metrics(4.0)
    assert grid.best_place(tried) == edge
    assert set(grid.to_try("dpo", tried)) == {(i, j - 1), (i, j + 1)}
    tried |= {(i, j - 1): metrics(3.0), (i, j + 1): {"failed": "loss is inf"}}
    tried[i + 2, j] = metrics(9.0, collapsed=True)
    assert grid.best_place(tried) == edge and grid.to_try("dpo", tried) == []


def test_the_search_ends_at_the_end_of_a_ladder():
    last = len(grid.RATES) - 2, len(compare.LADDERS["dpo"][1]) - 1
    tried = {last: metrics(1.0), (last[0] + 1, last[1]): metrics(1.0)}
    beside = {(last[0] - 1, last[1]), (last[0], last[1] - 1)}
    assert set(grid.to_try("dpo", tried)) == beside
    assert grid.to_try("dpo", tried | dict.fromkeys(beside, metrics(0.0))) == []


def test_it_climbs_to_the_best_row_and_writes_what_it_tried(monkeypatch, tmp_path):
    """With made-up rewards: a hill whose top is at the highest rate and the weakest penalty."""
    asked = []

    def plane(configs, split, samples):
        (c,) = configs.values()
        name, values = compare.LADDERS[c.objective]
        reward = grid.RATES.index(c.lr) + values.index(getattr(c, name))
        return {"": metrics(float(reward))}, [], metrics(0.0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "LADDERS", {"dro": compare.LADDERS["dro"]})
    monkeypatch.setattr(grid, "run_cells", lambda cells, jobs: asked.extend(cells))
    monkeypatch.setattr(grid, "plane", plane)
    best = grid.main()
    assert best == {"dro": {"objective": "dro", "tau": 0.1, "lr": grid.RATES[-2]}}
    assert len(asked) == len({(c.tau, c.lr) for c in asked}) > 5
    assert {c.evolve for c in asked} == {None}  # rounds as the objective has them
    written = json.loads((tmp_path / "results" / "grid.json").read_text())
    assert written["command"] == "python -m experiments.grid"
    assert len(written["results"]["rows"]) == len(asked) and written["results"]["best"] == best
    (star,) = [row for row in written["results"]["rows"] if row.endswith(" *")]
    assert star == "dro, tau 0.1, lr 0.004 *"
    assert star in (tmp_path / "results" / "grid.txt").read_text()


def test_the_defaults_are_the_best_of_the_grid():
    path = ROOT / "results" / "grid.json"
    if not path.exists():
        pytest.skip("no grid has been run with these worlds: python -m experiments.grid")
    best = json.loads(path.read_text())["results"]["best"]
    assert set(best) == TRAINED
    for objective, settings in best.items():
        defaults = OBJECTIVES[objective].defaults
        for name in settings.keys() - {"objective"}:
            assert settings[name] == pytest.approx(defaults[name]), (objective, name)
