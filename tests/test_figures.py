"""The picture of a run, drawn from its files alone."""

import json
import shutil
import sys
import unittest.mock

import pytest
from helpers import small

import train
from harness import figures

NAMES = ("log.jsonl", "metrics.json", "frontier.json")


def copied(folder, to):
    """The files of a run that a picture is drawn from, elsewhere."""
    to.mkdir()
    for name in NAMES:
        shutil.copy(folder / name, to / name)
    return to


def panels(folder, pictures, monkeypatch):
    """The titles of the picture's panels."""
    from matplotlib.axes import Axes

    titles, real = [], Axes.set
    with monkeypatch.context() as patch:
        patch.setattr(
            Axes, "set", lambda ax, **how: titles.append(how.get("title")) or real(ax, **how)
        )
        assert pictures(folder) == f"curves: {folder / 'curves.png'}"
    assert (folder / "curves.png").stat().st_size > 10_000
    return [title for title in titles if title]


def test_a_run_is_drawn_from_copies_of_its_files(finished, pictures, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert pictures is figures.draw
    titles = panels(copied(finished[0], tmp_path / "copy"), pictures, monkeypatch)
    assert {"listwise distribution", "reward against KL", "loss"} <= set(titles)
    assert "value network, held-out prompts" not in titles


@pytest.mark.parametrize(
    "own, said",
    [
        ({"optimal_tau": 0.0, "optimal_kl": 4.52}, " (no optimum needs more than 4.5)"),
        ({"optimal_tau": 0.3, "optimal_kl": 4.52}, ""),
        ({"optimal_tau": None, "optimal_kl": None}, ""),
    ],
)
def test_the_axis_says_where_a_policy_is_beyond_the_frontier(finished, own, said):
    ax, named = unittest.mock.Mock(), {}
    ax.set = lambda **how: named.update(how)
    picture = json.loads((finished[0] / "frontier.json").read_text())
    figures.draw_frontier(ax, picture, [], {**finished[1], **own})
    assert named["xlabel"] == f"KL to the reference, nats{said}"


def test_dro_shows_its_residuals_and_its_values(tmp_path, pictures, monkeypatch):
    pytest.importorskip("matplotlib")
    train.main(small(tmp_path / "run", objective="dro", reference_steps=2, steps=4))
    titles = panels(tmp_path / "run", pictures, monkeypatch)
    assert any(title.startswith("residual") for title in titles)
    assert "value network, held-out prompts" in titles and "listwise distribution" not in titles


def test_without_matplotlib_it_says_which_package_would_draw(finished, monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in pictures(finished[0])


def test_a_run_without_a_step_has_no_curves(finished, pictures, tmp_path):
    pytest.importorskip("matplotlib")
    folder = copied(finished[0], tmp_path / "copy")
    (folder / "log.jsonl").write_text("")
    assert pictures(folder) == "no picture of the curves: the run made no step"
    (folder / "log.jsonl").unlink()
    assert pictures(folder) == "no picture of the curves: the run made no step"
    assert not (folder / "curves.png").exists()


def test_a_folder_that_holds_no_run_is_an_error_that_names_the_file(tmp_path, pictures):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match="metrics.json"):
        pictures(tmp_path)


def test_a_file_of_lists_is_drawn_without_a_frontier(finished, pictures, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = copied(finished[0], tmp_path / "copy")
    (folder / "frontier.json").unlink()
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("reward", None)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    titles = panels(folder, pictures, monkeypatch)
    assert "reward against KL" not in titles and "reward, held-out prompts" not in titles
    assert "loss" in titles
