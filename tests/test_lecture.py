"""The lecture figures: their numbers against closed forms, their drawing, their captions."""

import doctest
import importlib
import json
import math
import re
import sys

import pytest
import torch
from helpers import ROOT, close

import dro
from experiments import lecture, lecture_data
from harness.config import ConfigError
from objectives import OBJECTIVES
from tasks import TASKS

ASSETS = ROOT / "assets" / "lecture"

# -------------------------------------------------------------------------------- numbers: formulas


def test_the_largest_p_depends_on_length_over_t_squared_alone():
    probs = lecture_data.largest_probs(lists=200)
    for T in (1, 2, 4):
        close(probs[T][30], probs[2 * T][4 * 30])
    assert {values[0] for values in probs.values()} == {1 / 8}
    assert all(values == sorted(values) for values in probs.values())


def test_the_largest_p_of_two_is_a_mean_of_sigmoids():
    """M = 2: the larger P is sigmoid(|d| / T), d normal with variance 2 n deviation^2."""
    probs = lecture_data.largest_probs(M=2, lists=10_000)
    d = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = (-(d**2) / 2).exp() / (-(d**2) / 2).exp().sum()
    for n, T in ((5, 2), (50, 8), (128, 1)):
        spread = math.sqrt(2 * n) * lecture_data.TOKEN_DEVIATION / T
        expected = (density * (spread * d.abs()).sigmoid()).sum().item()
        assert probs[T][n] == pytest.approx(expected, abs=0.01)


def test_without_spread_a_sum_is_a_softmax_of_lengths_and_a_mean_is_even():
    probs = lecture_data.probs_by_length(lists=2, deviation=0.0)
    lengths = torch.tensor(lecture_data.UNLIKE, dtype=torch.float64)
    cost = -lecture_data.TOKEN_MEAN / lecture_data.SCORES["sum"]
    close(probs["sum"], (-cost * lengths).softmax(-1))
    close(probs["mean"], torch.full_like(lengths, 1 / len(lengths)))


def test_with_spread_a_sum_still_prefers_the_shortest_and_p_sums_to_one():
    probs = lecture_data.probs_by_length()
    for values in probs.values():
        close(sum(values), 1.0)
    assert probs["sum"] == sorted(probs["sum"], reverse=True) and probs["sum"][0] > 0.8
    assert max(probs["mean"]) < 0.16


@pytest.mark.parametrize("T, gap, beta", [(2.0, 2.0, 0.5), (3.0, math.log(3), 1 / 3)])
def test_the_weights_of_a_pair_are_the_closed_forms(T, gap, beta):
    margins = lecture_data.MARGINS
    data = lecture_data.weights(margins, temperature=T, reward_gap=gap, beta=beta)
    P = (margins / T).sigmoid()
    close(data["LIRE"], P * (1 - P) * math.tanh(gap / 2) / T)
    close(data["DPO"], beta * (-beta * margins).sigmoid())
    assert margins[data["LIRE"].argmax()].item() == pytest.approx(0.0, abs=1e-9)
    close(data["LIRE"].max(), math.tanh(gap / 2) / (4 * T))
    far = lecture_data.weights(torch.tensor([-500.0]).double(), T, gap, beta)
    close(far["LIRE"], [0.0])
    close(far["DPO"], [beta])


def test_the_optima_are_those_of_the_formula():
    for tau, (value, probs) in lecture_data.optima().items():
        ref_logps, rewards = lecture_data.example()
        close(value, dro.optimal_value(ref_logps, rewards, tau).item())
        Z = sum(p * math.exp(r / tau) for p, r in zip(lecture_data.REF, lecture_data.REWARDS))
        close(value, tau * math.log(Z))
        terms = zip(lecture_data.REF, lecture_data.REWARDS)
        close(probs, [p * math.exp(r / tau) / Z for p, r in terms])


def test_tau_over_2_ends_at_the_optimum_and_the_printed_half_elsewhere():
    for tau in (0.5, 5.0):
        right, printed = lecture_data.descent(tau, tau / 2, 300), lecture_data.descent(tau, 0.5, 60)
        best = dro.optimal_logps(*lecture_data.example(), tau)
        start = dro.kl_divergence(best, lecture_data.example()[0]).item()
        assert right[0] == printed[0] == pytest.approx(start)
        assert right[-1] < 1e-12
        if tau < 1:
            assert abs(printed[-1] - printed[-2]) < 1e-6 and 0.05 < printed[-1] < start
        else:
            assert printed[-1] > 1e3 * start
    close(lecture_data.descent(1.0, 0.5, 30), lecture_data.descent(1.0, 1.0 / 2, 30))
    paths = lecture_data.descents()
    assert paths[0.5]["tau/2"] == lecture_data.descent(0.5, 0.25)
    assert paths[5.0]["1/2"] == lecture_data.descent(5.0, 0.5)


# ------------------------------------------------------------------------ numbers: runs and results


@pytest.fixture
def short_runs(monkeypatch):
    """Runs of half a second, with the settings of the figures where these decide what is shown."""
    small = {"width": 32, "eval_prompts": 3, "eval_samples": 8}
    monkeypatch.setattr(lecture_data, "RUN", lecture_data.RUN | small)
    short = {"steps": 6, "eval_every": 2, "reference_steps": 20}
    for name in ("POOL", "MEMORISE", "VALUES", "DPO"):
        monkeypatch.setattr(lecture_data, name, getattr(lecture_data, name) | short)
    monkeypatch.setitem(lecture_data.POOL, "evolve", 3)
    monkeypatch.setattr(lecture_data, "SEEDS", (0,))
    monkeypatch.setattr(lecture_data, "UPDATES", {2: 1, 3: 2})


def test_no_tuned_default_reaches_a_figure():
    """Else the picture of the repository and the one that is drawn anew would tell two stories."""
    pools = [lecture_data.POOL | own for own in lecture_data.POOLS.values()]
    values = lecture_data.VALUES | {"steps": 3, "evolve": 1}
    for own in (*pools, lecture_data.MEMORISE, values, lecture_data.DPO):
        row = OBJECTIVES[own["objective"]]
        tuned = row.defaults | row.on_tasks | TASKS[lecture_data.RUN["task"]].defaults
        numbers = {name for name, value in tuned.items() if type(value) in (int, float)}
        assert numbers <= set(lecture_data.RUN | own)


def test_the_runs_give_what_their_figures_show(short_runs):
    rounds = lecture_data.pool_rounds()
    assert list(rounds) == list(lecture_data.POOLS)
    for own in rounds.values():
        assert list(own) == list(lecture_data.SHARES)
        assert all(len(values) == 3 for values in own.values())
        assert all(0 <= share <= 100 for share in own["lists/distinct"] + own["lists/tied"])
        assert max(own["lists/distinct"]) > 1  # per cent
    memorised = lecture_data.memorised()
    assert [step for step, _ in memorised["residual/rms"]] == [1, 2, 4, 6]
    assert [step for step, _ in memorised["residual/within_prompt"]] == [2, 4, 6]
    for own in (values := lecture_data.values_in_training()).values():
        assert len(own["value"]) == len(own["optimal_value"]) == 3
    assert list(values) == [2, 3]
    assert values[2]["optimal_value"] == pytest.approx(values[3]["optimal_value"], abs=0.2)
    logps = lecture_data.pair_logps()
    assert list(logps) == list(lecture_data.LOGPS) and all(x < 0 for _, x in logps["logps/chosen"])


def results(folder, name, content):
    (folder / f"{name}.json").write_text(json.dumps({"results": content}))


def test_the_plane_is_of_default_strengths_and_means_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(lecture_data, "RESULTS", tmp_path)
    seed = lambda kl, reward, efficiency: {
        "kl": kl,
        "policy_reward": reward,
        "efficiency": efficiency,
    }
    rows = {
        "lire, temperature 16": [seed(1.0, 5.0, 0.5), seed(2.0, 7.0, None)],
        "lire, temperature 8": [seed(9.0, 9.0, 0.9)] * 2,
        "dpo, beta 0.5": [{"failed": True}] * 2,
        "dro, tau 0.5": [seed(0.5, 4.5, None), {"failed": True}],
    }
    frontiers = [[[0.0, 4.0], [2.0, 8.0]], [[0.0, 4.0], [4.0, 9.0]]]
    reference = [{"policy_reward": 3.0}, {"policy_reward": 5.0}]
    content = {"rows": rows, "frontiers": frontiers, "reference": reference}
    results(tmp_path, "compare", content)
    plane = lecture_data.plane()
    assert plane.points == {"lire": (1.5, 6.0), "dro": (0.5, 4.5)}
    assert plane.efficiency == {"lire": 0.5} and plane.reference == 4.0
    assert plane.frontier == [(0.0, 4.0), (3.0, 8.5)]


def test_the_budget_is_read_as_its_experiment_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lecture_data, "RESULTS", tmp_path)
    seeds = [{"efficiency": 0.25}, {"efficiency": 0.75}, {"efficiency": None}, {"failed": "nan"}]
    rows = {"dro, single": {"1000": seeds[:2], "3000": seeds[1:3]}, "kto, single": {"1000": seeds}}
    results(tmp_path, "budget", {"rows": rows})
    assert lecture_data.efficiency_by_size() == {"dro, single": [(1000, 0.5)], "kto, single": []}


# -------------------------------------------------------------------------------- drawing, captions

STEPS = [(1, 1.0), (10, 0.9), (20, 0.4), (30, 0.2)]
STAND_INS = {  # of figures whose numbers are of runs and results
    "pool": {
        name: {"lists/distinct": [90, 30 + 40 * k], "lists/tied": [0, 50], "reward": [0.1, k]}
        for k, name in enumerate(lecture_data.POOLS)
    },
    "memorised": {"residual/rms": STEPS, "residual/within_prompt": [(10, 0.9), (20, 0.8)]},
    "values": {
        n: {"value": [0.1 * n, 0.2 * n], "optimal_value": [0.3, 0.7]} for n in lecture_data.UPDATES
    },
    "dpo": {"logps/chosen": [(1, -3.0), (9, -4.0)], "logps/rejected": [(1, -3.5), (9, -8.0)]},
    "plane": lecture_data.Plane(
        [(0.0, 4.0), (1.0, 7.0), (2.0, 8.0)],
        4.0,
        {"lire": (1.5, 6.0), "dro": (1.4, 6.0), "pro": (0.8, 6.0)},
        {"pro": 0.7, "lire": 0.5},
    ),
    "budget": {
        "dro, single": [(1000, -0.1), (3000, 0.3)],
        "kto, single": [],
        "rwr, lists": [(1000, 0.3)],
    },
}


@pytest.fixture(scope="module")
def numbers():
    """What each figure is drawn from here: its formula's numbers, or a stand-in."""
    rows = lecture.FIGURES.items()
    return {name: STAND_INS[name] if name in STAND_INS else row.data() for name, row in rows}


@pytest.mark.parametrize("name", lecture.FIGURES)
def test_every_figure_is_wide_and_small_and_no_words_are_cut_off(
    name, numbers, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text
    from PIL import Image

    figures, real = [], lecture.write_picture
    monkeypatch.setattr(
        lecture, "write_picture", lambda fig, path: figures.append(fig) or real(fig, path)
    )
    path = tmp_path / f"{name}.png"
    size = lecture.draw(name, numbers[name], path)
    assert size == path.stat().st_size and 5_000 < size <= lecture.MOST_BYTES
    with Image.open(path) as picture:
        width, height = picture.size
    assert width / height == pytest.approx(16 / 9, abs=0.01) and width >= 1270

    (fig,) = figures
    words = [text for text in fig.findobj(Text) if text.get_text() and text.get_visible()]
    assert len(words) > 5 and all(text.get_fontsize() >= 18 for text in words)
    said = fig.texts + [text for ax in fig.axes for text in [*ax.texts, ax.title]]
    said = [text for text in said if text.get_text()]
    boxes = [Text.get_window_extent(text) for text in said]  # without what it points at
    for k, (text, box) in enumerate(zip(said, boxes)):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
        assert inside, text.get_text()
        # Names at the ends of lines may touch where their lines do: a few pixels.
        for other, its in zip(said[:k], boxes):
            common = min(box.y1, its.y1) - max(box.y0, its.y0)
            beside = min(box.x1, its.x1) < max(box.x0, its.x0)
            assert beside or common < 6, f"{text.get_text()} on {other.get_text()}"


def test_names_stand_on_no_point_and_on_no_other_name():
    points = {"one": (100.0, 100.0), "two": (110.0, 100.0), "three": (90.0, 104.0)}
    offsets = lecture_data.label_offsets(points, [], 20.0, 0.0)
    boxes = {
        name: (x + offsets[name][0], y + offsets[name][1], 7.2 * len(name), 10.0)
        for name, (x, y) in points.items()
    }
    dots = [(x, y, 5.0, 5.0) for x, y in points.values()]
    for name, box in boxes.items():
        others = [own for other, own in boxes.items() if other != name] + dots
        assert all(lecture_data.overlap(box, other) == 0 for other in others), name


def test_a_picture_that_is_too_large_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(lecture, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="expected at most 1,000"):
        lecture.draw("optimum", lecture_data.optima(), tmp_path / "x.png")


def test_the_command_draws_one_and_leaves_out_what_has_no_results(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(lecture, "RESULTS", tmp_path)
    lecture.main("optimum", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["optimum.png"]
    assert lecture.caption("optimum") in capsys.readouterr().out
    rows = {name: lecture.FIGURES[name] for name in ("optimum", "plane")}
    monkeypatch.setattr(lecture, "FIGURES", rows)
    lecture.main(out=str(tmp_path / "all"))
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["captions.md", "optimum.png"]
    said = "plane is left out: python -m experiments.compare makes results/compare.json"
    assert said in capsys.readouterr().out
    with pytest.raises(ConfigError, match="choose from optimum, plane"):
        lecture.main("nothing", str(tmp_path))


def test_without_matplotlib_it_says_which_package_would_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lecture.main(out=str(tmp_path))
    assert "pip install matplotlib draws it" in capsys.readouterr().out
    assert (tmp_path / "captions.md").read_text() == lecture.captions()


def test_the_committed_pictures_are_those_of_the_table():
    there = [name for name in lecture.FIGURES if lecture.is_there(name)]
    assert sorted(path.stem for path in ASSETS.glob("*.png")) == sorted(there)
    assert all(path.stat().st_size <= 100_000 for path in ASSETS.glob("*.png"))
    assert (ASSETS / "captions.md").read_text() == lecture.captions()


@pytest.mark.parametrize("name", lecture.FIGURES)
def test_a_caption_names_what_exists(name):
    caption = " ".join(lecture.caption(name).split())
    quoted = re.findall(r"`([^`]+)`", caption)
    assert len(quoted) >= 3
    for words in quoted:
        if words.startswith("python -m "):
            assert (ROOT / (words.split()[-1].replace(".", "/") + ".py")).exists()
        elif "/" in words or words.endswith(".py"):
            assert (ROOT / words).exists() or words == "results/budget.json"
        else:
            module, _, function = words.rpartition(".")
            assert callable(getattr(importlib.import_module(module), function))
    for constant in re.findall(r"\b[A-Z]{4,}\b", caption):
        assert hasattr(lecture_data, constant) or constant == "LIRE", constant


def test_the_lectures_are_in_order_and_examples_are_right():
    lectures = [row.lecture for row in lecture.FIGURES.values()]
    assert lectures == sorted(lectures) and set(lectures) == set(lecture.LECTURES)
    assert doctest.testmod(lecture_data).failed == 0
