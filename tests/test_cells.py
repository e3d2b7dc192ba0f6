"""Cells: one run each, found again by settings, files and sources, and never run twice."""

import dataclasses
import json

import pytest
from helpers import LISTS, ROOT, imports, small, sources, write

import train
from experiments import cells
from harness.config import Config
from objectives import OBJECTIVES


def test_the_sources_of_a_cell_are_all_that_train_imports():
    paths, reached, todo = sources(), set(), ["train"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += imports(paths[module], paths)
    named = cells.SOURCES + cells.NO_NUMBERS
    assert len(named) == len(set(named))
    assert set(named) == {str(paths[module].relative_to(ROOT)) for module in reached}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Cells in a folder of their own, where train.main just notes the config that it was given."""
    configs = []

    def main(config):
        configs.append(config)
        metrics = {"lr": config.lr, "resumed": bool(config.resume)}
        for name, content in (("config.json", vars(config)), ("metrics.json", metrics)):
            (cells.FOLDER / config.out.split("/")[-1]).mkdir(exist_ok=True)
            (cells.FOLDER / config.out.split("/")[-1] / name).write_text(json.dumps(content))
        print("news of the run")

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(cells, "FOLDER", tmp_path / "cells")
    return configs


def test_a_cell_is_named_by_its_settings_its_files_and_the_sources(tmp_path, monkeypatch):
    config = small("", data=[write(tmp_path, *LISTS)])
    first = cells.folder_of(config)
    assert cells.folder_of(dataclasses.replace(config, out="elsewhere")) == first
    default = OBJECTIVES["lire"].defaults["lr"]
    assert cells.folder_of(dataclasses.replace(config, lr=default)) == first  # spelt out
    assert cells.folder_of(dataclasses.replace(config, lr=2 * default)) != first
    write(tmp_path, *LISTS[:-1])
    assert cells.folder_of(config) != first
    write(tmp_path, *LISTS)
    assert cells.folder_of(config) == first
    (tmp_path / "root").mkdir()
    for name in ("lire.py", "train.py"):
        (tmp_path / "root" / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(cells, "SOURCES", ["lire.py", "train.py"])
    monkeypatch.setattr(cells, "ROOT", tmp_path / "root")
    before = cells.folder_of(config)
    (tmp_path / "root" / "lire.py").write_text("changed = True")
    assert cells.folder_of(config) != before


def test_a_cell_is_run_once(trained):
    config = small("", lr=0.25)
    assert cells.run_one(config) == cells.run_one(config) == {"lr": 0.25, "resumed": False}
    (ran,) = trained
    folder = cells.folder_of(config)
    assert (ran.out, ran.resume) == (str(folder), "")
    assert folder.with_suffix(".log").read_text() == "news of the run\n"


def test_an_interrupted_cell_goes_on_where_it_was(trained):
    config = small("", lr=0.25)
    folder = cells.folder_of(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert cells.run_one(config)["resumed"] and trained[0].resume == str(folder)


def test_a_run_that_left_the_finite_numbers_is_a_result_like_any_other(trained, monkeypatch):
    def diverged(config):
        trained.append(config)
        cells.folder_of(config).mkdir(exist_ok=True)
        raise FloatingPointError("step 7: loss is nan")

    monkeypatch.setattr(train, "main", diverged)
    for _ in range(2):
        assert cells.run_one(small("")) == {"failed": "step 7: loss is nan"}
    assert len(trained) == 1


def test_cells_come_back_in_their_order_and_finished_ones_are_counted(trained, capsys):
    configs = [small("", lr=lr) for lr in (0.25, 0.5, 0.75)]
    for config in reversed(configs):
        cells.run_one(config)
    assert [metrics["lr"] for metrics in cells.run_cells(configs, jobs=1)] == [0.25, 0.5, 0.75]
    assert "3 cells, 3 of them done already" in capsys.readouterr().out and len(trained) == 3


def test_cells_run_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(**{**vars(small("")), "steps": 1, "reference_steps": 1, "evolve": 1})
    (metrics,) = cells.run_cells([config], jobs=1)
    assert metrics == json.loads((cells.folder_of(config) / "metrics.json").read_text())
    assert metrics["seconds_train"] >= 0


def test_results_say_which_command_made_them_and_when(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells.write_results("sft", "python -m experiments.tables sft", {"row": [1.5]})
    written = json.loads((tmp_path / "results" / "sft.json").read_text())
    date = written.pop("date")
    assert written == {"command": "python -m experiments.tables sft", "results": {"row": [1.5]}}
    assert [len(part) for part in date.split("-")] == [4, 2, 2]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.name
)
def test_every_result_names_its_command_and_its_day(path):
    written = json.loads(path.read_text())
    assert set(written) == {"command", "date", "results"} and written["results"]
    words = written["command"].split()
    assert words[:2] == ["python", "-m"] and words[2] in sources()
    named = all(word in written["command"] for word in path.stem.split("-"))
    assert named or path.stem.startswith(("compare", "grid", "copa"))
    assert written["date"].count("-") == 2
