"""The README is executed: its commands parse, its code runs, its tables are those in results/."""

import doctest
import importlib
import importlib.util
import json
import re
import shlex

import pytest
from runs import ROOT, sources

import objectives
from experiments import compare, copa, exact, tables
from harness.config import Config, ConfigError, command_line, resolve
from objectives import OBJECTIVES

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
def test_every_command_exists_and_its_options_parse(command):
    words = shlex.split(command)
    if words[:2] == ["python", "train.py"] and words[2:] != ["--help"] and "--resume" not in words:
        resolve(command_line(words[2:]))
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


def test_a_new_objective_is_one_function_and_one_row():
    examples = [block for block in BLOCKS["python"] if "OBJECTIVES" in block]
    assert len(examples) == 1, "README.md shows once how an objective is put into OBJECTIVES"
    (example,) = examples
    assert len(example.strip().splitlines()) <= 12
    before = set(OBJECTIVES)
    try:
        exec(example, {**vars(objectives)})
        (new,) = set(OBJECTIVES) - before
        objectives.try_objective(resolve(Config(objective=new)))
        with pytest.raises(ConfigError, match=new):
            resolve(Config(objective=f"{new}s"))
    finally:
        for name in set(OBJECTIVES) - before:
            del OBJECTIVES[name]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.name
)
def test_the_tables_are_those_of_the_results(path):
    results = json.loads(path.read_text())["results"]
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


WITH_EXAMPLES = "lire dro frontier baselines model data tasks harness.evaluation".split()


@pytest.mark.parametrize("module", sources())
def test_no_docstring_example_is_wrong(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0 and (result.attempted or module not in WITH_EXAMPLES)
