"""The comparison: what it measures is held against enumeration, what it writes is read again."""

import csv
import io
import json
import math

import pytest
import torch
from helpers import SMALL

import frontier
from experiments import cells, compare
from harness.config import Config, ConfigError, resolve
from objectives import OBJECTIVES

OWN = {
    **{name: SMALL[name] for name in ("layers", "heads", "width", "evolve")},
    "reference_steps": 60,
    "steps": 40,
    "lr": 3e-3,
    "eval_every": 40,
    "eval_prompts": 12,
    "eval_samples": 64,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two objectives on tiny, in a folder of its own: (results, folder)."""
    settings = compare.compare_rows(quick=True)
    rows = {row: own for row, own in settings.items() if own["objective"] in ("lire", "dpo")}
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(compare, "QUICK", OWN)
        patch.setattr(compare, "compare_rows", lambda quick: rows)
        patch.setattr(compare, "run_cells", lambda configs, jobs: list(map(cells.run_one, configs)))
        results = compare.main(quick=True, task="tiny")
    return results, folder


def test_the_plane_agrees_with_enumeration(compared):
    results, folder = compared
    assert len(results["rows"]) == 2
    for row in results["rows"]:
        settings = compare.compare_rows(quick=True)[row]
        c = Config(task="tiny", model="gpt", **OWN, **settings)
        exact = json.loads((folder / cells.folder_of(c) / "metrics.json").read_text())
        found = results["rows"][row][0]
        assert found["kl"] == pytest.approx(exact["kl"], rel=0.25)
        assert found["policy_reward"] == pytest.approx(exact["policy_reward"], abs=0.25)
        assert found["efficiency"] == pytest.approx(exact["efficiency"], abs=0.15)


def test_it_writes_the_same_as_text_csv_json_and_picture(compared):
    results, folder = compared
    written = {p.suffix: p for p in (folder / "results").iterdir()}
    content = json.loads(written[".json"].read_text())
    assert content["results"] == json.loads(json.dumps(results))
    assert content["command"] == "python -m experiments.compare --quick --task tiny"
    assert written[".txt"].read_text() == compare.table(results) + "\n"
    rows = list(csv.DictReader(io.StringIO(written[".csv"].read_text())))
    assert [r["row"] for r in rows] == ["lire, temperature 16", "dpo, beta 0.5"]
    assert float(rows[0]["kl"]) == results["rows"]["lire, temperature 16"][0]["kl"]
    pytest.importorskip("matplotlib")
    assert written[".png"].stat().st_size > 10_000


def test_the_frontier_rises_and_nobody_is_above_it(compared):
    results, _ = compared
    kl, reward = torch.tensor(results["frontiers"][0]).T.contiguous()
    assert (kl.diff() >= -1e-9).all() and (reward.diff() >= -1e-9).all()
    for found in results["rows"].values():
        for m in found:
            # The point at its KL or just beyond.
            k = min(torch.searchsorted(kl, torch.tensor(m["kl"])).item(), len(kl) - 1)
            assert m["kl"] > 0.05 and m["policy_reward"] < reward[k] + 0.1
            assert m["efficiency"] < 1


def test_one_answer_less_reward_or_far_too_much_kl_are_collapses():
    reference = {"policy_distinct": 0.9, "entropy": 4.0, "policy_reward": 0.5}
    good = {"policy_distinct": 0.1, "samples": 32, "entropy": 0.5, "policy_reward": 0.5, "kl": 5.9}
    assert not compare.collapsed(good, reference, 3.0)
    for name, value in (
        ("policy_distinct", 0.06),
        ("entropy", 0.3),
        ("policy_reward", 0.4),
        ("kl", 6.1),
        ("kl", math.nan),
    ):
        assert compare.collapsed({**good, name: value}, reference, 3.0), name


def test_joint_weights_of_two_are_the_mixture_weights_and_of_three_find_what_enumeration_finds():
    g = torch.Generator().manual_seed(3)
    # Three models, 4 prompts, 20 responses.
    exact = (2 * torch.randn(3, 4, 20, generator=g, dtype=torch.float64)).log_softmax(-1)
    rewards, n = torch.randn(4, 20, generator=g, dtype=torch.float64), 20_000
    drawn = [model.exp().multinomial(n, True, generator=g) for model in exact]
    samples = torch.cat(drawn, -1)  # [4, 3 n]
    logps, earned = exact.gather(-1, samples.expand(3, -1, -1)), rewards.gather(-1, samples)
    pair = exact[:2].gather(-1, samples[:, : 2 * n].expand(2, -1, -1))
    for joint, mixture in zip(
        compare.joint_weights(pair), frontier.mixture_weights(pair[1] - pair[0])
    ):
        assert torch.allclose(joint, mixture)
    weights = compare.joint_weights(logps)
    for k in (1, 2):
        sampled, whole = (
            frontier.frontier(weights[0], weights[k], earned),
            frontier.frontier(exact[0], exact[k], rewards),
        )
        assert sampled.kl == pytest.approx(whole.kl, rel=0.02)
        assert sampled.efficiency == pytest.approx(whole.efficiency, abs=0.02)


@pytest.mark.parametrize("seeds", [0, -1])
def test_no_seeds_are_refused(seeds):
    with pytest.raises(ConfigError, match="--seeds must be at least 1"):
        compare.main(seeds=seeds)


def test_own_metrics_by_hand():
    # Two samples of the reference, then two of the policy.
    logps = torch.tensor([[-1.0, -2.0, -3.0, -5.0]])
    ref_logps = torch.tensor([[-1.0, -1.0, -4.0, -4.0]])
    rewards = torch.tensor([[0.0, 1.0, 1.0, 2.0]])
    m = compare.own_metrics([[[5, 9], [5, 9]]], logps, ref_logps, rewards, 1, 2)
    assert m["policy_reward"] == (1 + 2) / 2 and m["win_rate"] == (1 + 1 / 2 + 1 + 1) / 4
    assert m["kl"] == ((-3 + 4) + (-5 + 4)) / 2 and m["entropy"] == (3 + 5) / 2
    assert m["policy_length"] == 2 and m["policy_distinct"] == 1 / 2


def test_failures_and_collapses_are_told_on_their_row():
    good = {name: 1.0 for name in compare.COLUMNS}
    results = {
        "reference": [good],
        "rows": {"a": [good, {**good, "collapsed": True}], "b": [{"failed": True}, good]},
    }
    lines = compare.table(results).splitlines()
    assert lines[3].endswith("1 of 2 collapsed |") and lines[4].endswith("1 of 2 failed |")
    assert "(1 of 2)" in lines[4] and "nan" not in compare.table(results)


def test_who_spends_more_than_any_optimum_needs_is_told_on_its_row():
    good = {name: 1.0 for name in compare.COLUMNS} | {"beyond": False}
    far = good | {"beyond": True}
    rows = {"a": [far, good], "b": [far, {**far, "collapsed": True}], "c": [good, good]}
    lines = compare.table({"reference": [good], "rows": rows}).splitlines()
    assert lines[3].endswith(" 1 of 2 beyond the optimum's KL |")
    assert lines[4].endswith(" 1 of 2 collapsed, 2 of 2 beyond the optimum's KL |")
    assert lines[5].endswith("|  |") and lines[2].endswith("|  |")


def test_a_row_is_beyond_where_the_frontier_has_ended(compared, monkeypatch):
    """No policy of the comparison is; with the frontier cut off at a little KL both are."""
    results, folder = compared
    assert [m["beyond"] for found in results["rows"].values() for m in found] == [False, False]
    monkeypatch.chdir(folder)
    real = frontier.frontier
    ended = lambda *given, **how: real(*given, **how)._replace(tau=0.0)
    monkeypatch.setattr(frontier, "frontier", ended)
    configs = {
        row: Config(task="tiny", model="gpt", **OWN, **compare.compare_rows(True)[row])
        for row in results["rows"]
    }
    metrics, _, _ = compare.plane(configs, "heldout", 8)
    assert [m["beyond"] for m in metrics.values()] == [True, True]


def test_every_objective_that_trains_is_compared_at_its_default_strength():
    trained = {name for name, row in OBJECTIVES.items() if row.loss}
    for quick in (True, False):
        rows = compare.compare_rows(quick)
        assert {settings["objective"] for settings in rows.values()} == trained
        for settings in rows.values():
            resolve(Config(**settings))
        at_default = set()
        for settings in rows.values():
            objective, *strengths = settings.values()
            defaults = OBJECTIVES[objective].defaults
            own = [defaults[name] for name in settings if name != "objective"]
            at_default |= {objective} if strengths == own else set()
        assert at_default == trained
    assert len(compare.compare_rows(True)) == len(trained)
    name, values = compare.LADDERS["lire"]
    place = values.index(OBJECTIVES["lire"].defaults[name])
    whole = [row for row in compare.compare_rows(False) if row.startswith("lire, ")]
    assert whole == [f"lire, {name} {value:g}" for value in values[place - 1 : place + 2]]
