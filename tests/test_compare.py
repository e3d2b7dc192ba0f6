"""The comparison: what it measures is held against enumeration, what it writes is read again."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch

import frontier
import train
from experiments import cells, compare

SMALL = {
    "layers": 1, "heads": 2, "width": 32, "reference_steps": 60, "steps": 40, "evolve": 2, "lr": 3e-3, "eval_every": 40,
    "eval_prompts": 12, "eval_samples": 64, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A comparison of two objectives on tiny, in a folder of its own: (results, folder)."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(compare, "QUICK", SMALL)
        patch.setattr(compare, "STRENGTHS", {k: compare.STRENGTHS[k] for k in ("lire", "dpo")})
        patch.setattr(cells, "run", lambda configs, jobs: [cells.run_one(c) for c in configs])
        results = compare.main(quick=True, task="tiny")
    return results, folder


def test_the_plane_agrees_with_enumeration(small):
    results, folder = small
    assert len(results["rows"]) == 2
    for row in results["rows"]:
        settings = compare.rows_of(quick=True)[row]
        c = train.Config(task="tiny", model="gpt", **SMALL, **settings)
        exact = json.loads((folder / cells.folder_of(c) / "metrics.json").read_text())
        found = results["rows"][row][0]
        assert found["kl"] == pytest.approx(exact["kl"], rel=0.25)
        assert found["policy_reward"] == pytest.approx(exact["policy_reward"], abs=0.25)
        assert found["efficiency"] == pytest.approx(exact["efficiency"], abs=0.15)


def test_it_writes_the_same_as_text_csv_json_and_picture(small):
    results, folder = small
    written = {p.suffix: p for p in (folder / "results").iterdir()}
    assert json.loads(written[".json"].read_text()) == json.loads(json.dumps(results))
    assert written[".txt"].read_text() == compare.table(results) + "\n"
    rows = list(csv.DictReader(io.StringIO(written[".csv"].read_text())))
    assert [r["row"] for r in rows] == ["lire, temperature 4", "dpo, beta 0.03"]
    assert float(rows[0]["kl"]) == results["rows"]["lire, temperature 4"][0]["kl"]
    pytest.importorskip("matplotlib")
    assert written[".png"].stat().st_size > 10_000


def test_the_frontier_rises_and_nobody_is_above_it(small):
    results, _ = small
    kl, reward = torch.tensor(results["frontiers"][0]).T.contiguous()
    assert (kl.diff() >= -1e-9).all() and (reward.diff() >= -1e-9).all()
    for found in results["rows"].values():
        for m in found:
            k = min(
                torch.searchsorted(kl, torch.tensor(m["kl"])).item(), len(kl) - 1
            )  # the point at its KL or just beyond
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
    exact = (2 * torch.randn(3, 4, 20, generator=g, dtype=torch.float64)).log_softmax(
        -1
    )  # three models, 4 prompts, 20 responses
    rewards, n = torch.randn(4, 20, generator=g, dtype=torch.float64), 20_000
    samples = torch.cat(
        [of.exp().multinomial(n, True, generator=g) for of in exact], -1
    )  # [4, 3 n]
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
    with pytest.raises(train.ConfigError, match="--seeds must be at least 1"):
        compare.main(seeds=seeds)


def test_own_metrics_by_hand():
    logps = torch.tensor(
        [[-1.0, -2.0, -3.0, -5.0]]
    )  # two samples of the reference, then two of the policy
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


def test_the_defaults_are_the_best_of_the_grid():
    results = json.loads((Path(train.__file__).parent / "results" / "grid.json").read_text())
    assert set(results["rows"]) == set(compare.grid_rows())
    for objective, settings in compare.best(results).items():
        assert settings == {"objective": objective} | {
            k: train.BEST[objective][k] for k in settings if k != "objective"
        }


def test_everyone_has_the_same_grid_of_settings_that_exist():
    rows = compare.grid_rows()
    for objective, (name, _) in compare.STRENGTHS.items():
        own = [s for s in rows.values() if s["objective"] == objective]
        assert len(own) == 9 and len({(s[name], s["lr"]) for s in own}) == 9
        for settings in own:
            train.resolve(train.Config(**settings))
