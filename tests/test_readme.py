"""The README is executed: its commands parse, its code runs, its tables are those in results/."""

import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import train
from experiments import compare, copa, exact, tables

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
BLOCKS = {
    kind: re.findall(rf"```{kind}\n(.*?)```", README, re.S) for kind in ("bash", "python", "json")
}
COMMANDS = [
    part.strip()
    for block in BLOCKS["bash"]
    for line in block.splitlines()
    for part in line.split("&&")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_its_options_parse(command, monkeypatch, tmp_path):
    words = shlex.split(command)
    if words[:2] == ["python", "train.py"] and words[2:] != ["--help"] and "--resume" not in words:
        train.resolve(train.command_line(words[2:]))
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[:3] == ["pip", "install", "-r"]:
        assert (ROOT / words[3]).exists()
    else:
        assert words[0] in ("pytest", "python")


def test_requirements_are_the_three_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [re.split("[=<>]", line)[0] for line in lines] == ["torch", "numpy", "tiktoken"]


def test_ci_runs_exactly_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert (
        script.rstrip().endswith("\npytest")
        and "requirements-dev.txt" in script
        and "ruff check" in script
    )


def test_the_loss_example_runs():
    example = next(block for block in BLOCKS["python"] if "import lire" in block)
    names = {}
    exec(example, names)
    assert names["logps"].grad.sum().abs() < 1e-6


def test_a_new_objective_is_one_function_and_one_line(monkeypatch):
    example = next(block for block in BLOCKS["python"] if "compute_loss" in block)
    function, line = example.split("# in compute_loss of train.py:\n")
    assert len(example.strip().splitlines()) <= 10
    source = inspect.getsource(train.compute_loss).splitlines()
    refusal = next(
        i for i, text in enumerate(source) if text.strip().startswith("raise ConfigError")
    )
    source.insert(refusal, line.rstrip())
    names = dict(vars(train))
    exec(function + "\n" + "\n".join(source), names)
    monkeypatch.setattr(train, "compute_loss", names["compute_loss"])
    train.try_objective(train.Config(objective="hinge", reward_norm="none"))
    with pytest.raises(train.ConfigError):
        train.try_objective(train.Config(objective="hinges", reward_norm="none"))
    logps = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    loss = names["hinge_loss"](logps, torch.tensor([[0.0, 1.0]]), torch.tensor([[True, True]]))
    assert loss.item() == pytest.approx(1 + 3 - 2)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.name)
def test_the_tables_are_those_of_the_results(path):
    results = json.loads(path.read_text())
    if path.stem.startswith(("compare-", "grid")):
        pytest.skip("the README shows the whole comparison alone")
    if path.stem == "copa":
        printed = [copa.table(scores) for scores in results.values()]
    else:
        whole = {"exact": exact.table, "compare": compare.table}.get(
            path.stem, lambda found: tables.table(path.stem, found)
        )
        printed = [whole(results)]
    for text in printed:
        assert text in README, f"README.md does not hold the table of {path.name}"


def test_no_docstring_example_is_wrong():
    import doctest

    import baselines
    import data
    import dro
    import lire
    import model
    from experiments import bench

    for module in (lire, dro, baselines, model, data, train, bench):
        result = doctest.testmod(module)
        assert result.failed == 0 and (result.attempted or module is train)
