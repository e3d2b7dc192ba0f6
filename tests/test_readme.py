"""The pages are executed: commands parse, code is the project's, tables are those of results/."""

import dataclasses
import doctest
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import formats
from experiments import compare, report
from harness.command_line import command_line
from harness.config import Config, resolve
from objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "docs/changing.md",
    "docs/data.md",
    "docs/differences.md",
    "docs/metrics.md",
    "docs/models.md",
    "docs/maths.md",
    "exercises/README.md",
    "results/README.md",
]


def blocks(kind, page="README.md"):
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.S)


def commands(page):
    """Whole lines of bash blocks, and what stands in backticks and begins like a command."""
    text = (ROOT / page).read_text()
    lines = [line for block in blocks("bash", page) for line in block.splitlines()]
    lines += re.findall(r"`((?:python|bash|pytest|torchrun) [^`\n]*)`", text)
    return [part.strip() for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("page, command", [(page, c) for page in PAGES for c in commands(page)])
def test_every_command_exists_and_its_options_parse(page, command):
    words = shlex.split(command)
    if words[:2] == ["python", "train.py"]:
        if "--help" not in words and "--resume" not in words and "echo" not in words:
            resolve(dataclasses.replace(command_line(words[2:]), init=""))  # a folder not here
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
        options = [word for word in words[3:] if word.startswith("--")]
        source = Path(importlib.util.find_spec(words[2]).origin).read_text()
        assert all(f'"{option}"' in source for option in options)
    elif words[:3] == ["torchrun", "--nproc-per-node", "2"]:
        source = Path(importlib.util.find_spec(words[words.index("-m") + 1]).origin).read_text()
        options = [word[2:].replace("-", "_") for word in words[4:] if word.startswith("--")]
        assert all(re.search(rf'"--{x}"|\b{x}\b', source) for x in options) and len(options) > 2
    elif words[:3] == ["pip", "install", "-r"]:
        assert (ROOT / words[3]).exists()
    else:
        assert words in (["pytest", "-n", "auto"], ["bash", ".ci/run"], ["python", "formats.py"])


def test_it_fits_a_break():
    assert len(README.splitlines()) <= 220 and len(README.encode()) <= 14_000
    assert README.count("![") == 1  # one picture


def test_every_file_and_option_that_a_page_names_exists():
    fields = {f.name for f in dataclasses.fields(Config)} | {"help", "margin", "votes"}
    fields.add("nproc_per_node")  # of torchrun
    scripts = [*(ROOT / "experiments").glob("*.py"), *(ROOT / "exercises").glob("*.py")]
    of_scripts = {x for path in scripts for x in re.findall(r'"--([a-z-]+)"', path.read_text())}
    for page in PAGES:
        text = (ROOT / page).read_text()
        for path in re.findall(r"`([\w/]+\.(?:py|md|png))`|\]\(([\w/.]+)\)", text):
            name = path[0] or path[1]
            beside = (ROOT / page).parent / name
            assert (ROOT / name).exists() or beside.exists() or name == "curves.png", (
                f"{name} in {page}"
            )
        for name in re.findall(r"`[^`\n]*?--([a-z][a-z-]*)", text):
            known = name.replace("-", "_") in fields
            assert known or name in of_scripts, f"--{name} in {page}"


def test_the_reading_order_names_the_flat_files():
    cells = re.findall(r"^\| \d+ \| (`.*?`) \|", README, re.M)
    rows = [name for cell in cells for name in re.findall(r"\w+\.py", cell)]
    assert sorted(rows) == sorted(path.name for path in ROOT.glob("*.py"))


def test_the_loop_is_that_of_train_py():
    [loop] = [block for block in blocks("python") if block.startswith("for step in")]
    source = [line.strip() for line in (ROOT / "train.py").read_text().splitlines()]
    for line in loop.splitlines():
        assert line.split("  #")[0].strip() in [s.split("  #")[0] for s in source], line


def test_the_result_table_is_that_of_the_comparison():
    results = json.loads((ROOT / "results/compare.json").read_text())["results"]
    whole = [line.split(" | ") for line in compare.table(results).splitlines()]
    cells = {row[0]: row for row in whole}
    columns = ["policy_reward", "win_rate", "kl", "efficiency"]
    places = [whole[0].index(name) for name in columns]
    section = README.split("## Results")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows[0] == "| | " + " | ".join(columns) + " |"
    assert 1 <= len(rows[1:]) <= 7
    for row in rows[1:]:
        own = cells[row.split(" | ")[0]]
        assert row == " | ".join([own[0], *(own[place] for place in places)]) + " |"


def test_results_readme_is_what_report_writes():
    assert (ROOT / "results/README.md").read_text() == report.report()
    named = {path.stem for path in (ROOT / "results").glob("*.json")}
    assert named <= set(report.SECTIONS)


def test_every_logged_metric_is_explained():
    text = (ROOT / "docs/metrics.md").read_text()
    known = set(re.findall(r"`([\w/*]+)`", text))
    for name in OBJECTIVES:
        source = (ROOT / "objectives.py").read_text() + (ROOT / "harness/update.py").read_text()
        for metric in re.findall(
            r'"((?:loss|rewards|logps|candidates|value|residual)/\w+)"', source
        ):
            assert metric in known, f"{metric} of {name}"
    evaluation = (ROOT / "harness/evaluation.py").read_text()
    for metric in re.findall(r'^ +"(\w+)":|metrics\["([\w/]+)"\] =', evaluation, re.M):
        name = metric[0] or metric[1]
        if name not in ("frontier", "policy", "reference", "longest", "prompt", "ood", "train"):
            assert (
                name in known or re.sub(r"^(policy|reference)_(sum|mean|ratio)$", "", name) == ""
            ), name


def test_the_json_example_is_a_record():
    [example] = re.findall(r'`(\{"prompt".*?\})`', README)
    record = formats.read_canonical(json.loads(example))
    assert len(record["responses"]) == len(record["rewards"]) == 2


def test_requirements_are_the_three_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [re.split("[=<>]", line)[0] for line in lines] == ["torch", "numpy", "tiktoken"]


def test_ci_runs_exactly_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().endswith("\npytest -n auto")
    assert "requirements-dev.txt" in script and "ruff check" in script


@pytest.mark.parametrize(
    "name",
    """lire dro baselines frontier model data tasks records files objectives harness.evaluation
    experiments.bench""".split(),
)
def test_no_docstring_example_is_wrong(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_step_of_the_derivations_holds():
    default = torch.get_default_dtype()
    try:
        assert doctest.testfile(str(ROOT / "docs" / "maths.md"), False).failed == 0
    finally:
        torch.set_default_dtype(default)
