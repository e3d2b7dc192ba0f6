"""The changes of README.md and docs/changing.md, made in a copy and run as a reader would."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = (
    "--steps 2 --reference-steps 2 --layers 1 --heads 2 --width 16 --batch-size 4 --eval-prompts 2"
)


def blocks(path, heading):
    """The python blocks under a heading of a page."""
    text = (ROOT / path).read_text()
    section = re.split(r"^## ", text.split(f"## {heading}\n", 1)[1], flags=re.M)[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture
def project(tmp_path):
    """A copy of the sources: (folder, insert(file, anchor, block), run(command) -> output)."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("harness", "experiments"):
        shutil.copytree(ROOT / name, folder / name)

    def insert(file, anchor, block):
        source = (folder / file).read_text()
        assert source.count(anchor) == 1, f"{anchor!r} in {file}"
        (folder / file).write_text(source.replace(anchor, block + anchor))

    def run(command, fails=False):
        words = [sys.executable, *command.split()]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    return folder, insert, run


def add_row(insert, file, table, row):
    """Put a row behind the first line of a table, by way of the row that stands there."""
    first = re.search(
        rf"^{table} = {{.*\n((?:    #.*\n)*    \S+:)", (ROOT / file).read_text(), re.M
    )
    insert(file, first[1], row)


def test_an_objective_with_a_strength_of_its_own(project):
    folder, insert, run = project
    function, lines = blocks("README.md", "Change it")
    row, field = lines.splitlines(keepends=True)
    assert len(function.splitlines()) + len(lines.splitlines()) <= 10
    insert("objectives.py", "# Learning rates and strengths: most reward", function + "\n\n")
    add_row(insert, "objectives.py", "OBJECTIVES", row)
    insert("harness/config.py", "    shuffle_prompts: bool = option(", field)
    assert "what is minimised: hinge, lire," in " ".join(run("train.py --help").split())
    assert "--margin is an option of hinge: --objective lire does not read it" in run(
        "train.py --objective lire --margin 2", fails=True
    )
    assert "--margin must be positive" in run("train.py --objective hinge --margin 0", fails=True)
    assert "hinge" in run("train.py --objective unknown", fails=True)
    run(f"train.py --objective hinge --margin 2 --task tiny {SMALL} --out out/run")
    assert json.loads((folder / "out/run/config.json").read_text())["margin"] == 2
    rows = (folder / "out/run/log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["loss"] > 0
    found = (
        "import json; from experiments.compare import compare_rows; print(list(compare_rows(True)))"
    )
    (folder / "rows.py").write_text(found)
    assert "'hinge'" in run("rows.py")


def test_a_task(project):
    folder, insert, run = project
    function, row = blocks("docs/changing.md", "A task")
    insert("tasks.py", "class TaskRow(NamedTuple):", function + "\n\n")
    add_row(insert, "tasks.py", "TASKS", row)
    assert "echo" in run("train.py --help")
    assert "choose from echo, dialogue" in run("train.py --task chess", fails=True)
    run(f"train.py --task echo {SMALL} --eval-samples 8 --out out/run")
    metrics = json.loads((folder / "out/run/metrics.json").read_text())
    assert metrics["policy_reward"] is not None and metrics["ood_kl"] is not None
    run("train.py --task echo --layers 1 --heads 2 --width 16 --eval-prompts 2 --out out/own")
    config = json.loads((folder / "out/own/config.json").read_text())
    assert (config["steps"], config["reference_steps"]) == (100, 200)  # of the row


def test_a_format(project):
    folder, insert, run = project
    reader, row = blocks("docs/changing.md", "A format")
    insert("formats.py", "class Format(NamedTuple):", reader + "\n\n")
    add_row(insert, "formats.py", "FORMATS", row)
    votes = [
        {"question": f"Is {i} fine?", "a": "Yes.", "b": "No.", "votes_a": i, "votes_b": 3}
        for i in range(60)
    ]
    (folder / "votes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in votes))
    said = run(f"train.py --data votes.jsonl --vocab-size 300 {SMALL} --out out/run")
    assert (
        "votes.jsonl: answers with votes, 60 prompts, 120 responses; best of record 1: 'No.'"
        in said
    )
    del votes[3]["votes_b"]
    (folder / "votes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in votes))
    assert "votes.jsonl:4: votes_b is None" in run("train.py --data votes.jsonl", fails=True)


def test_the_loss_in_another_trainer():
    [example] = blocks("docs/changing.md", "Another trainer")
    names = {}
    exec(example, names)
    assert names["logps"].grad.abs().sum() > 0 and names["logps"].grad.sum().abs() < 1e-6
