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


# Several commands of train.py in one process, as importing torch takes longer than a small run.
DRIVER = """
import contextlib, io, json, sys
import train
from harness.command_line import command_line
from harness.run import run_script

train.draw = lambda folder: "not drawn"
results = []
for command in sys.argv[1:]:
    text, code = io.TextIOWrapper(io.BytesIO()), None
    with contextlib.redirect_stdout(text):
        try:
            run_script("train.py", lambda: train.main(command_line(command.split())))
        except SystemExit as e:
            code = e.code
    text.flush()
    results.append((text.buffer.getvalue().decode() + str(code or ""), bool(code)))
from experiments.compare import compare_rows
print(json.dumps({"said": results, "rows": list(compare_rows(True))}))
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the sources: (folder, insert(file, anchor, block), run(*commands) -> outputs).

    A command of train.py that is to fail has a ! before it. The last output is the comparison's.
    """
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

    def run(*commands):
        words = [sys.executable, "driver.py", *(command.lstrip("!") for command in commands)]
        (folder / "driver.py").write_text(DRIVER)
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
        content = json.loads(done.stdout)
        for command, (said, failed) in zip(commands, content["said"], strict=True):
            assert failed == command.startswith("!"), said
        return [said for said, _ in content["said"]] + [content["rows"]]

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
    insert(
        "objectives.py", "# Rates and strengths were chosen by experiments.grid", function + "\n\n"
    )
    add_row(insert, "objectives.py", "OBJECTIVES", row)
    insert("harness/config.py", "    shuffle_prompts: bool = option(", field)
    told, other, zero, unknown, _, compared = run(
        "--help",
        "!--objective lire --margin 2",
        "!--objective hinge --margin 0",
        "!--objective unknown",
        f"--objective hinge --margin 2 --task tiny {SMALL} --out out/run",
    )
    assert "what is minimised: hinge, lire," in " ".join(told.split())
    assert "--margin is an option of hinge: --objective lire does not read it" in other
    assert "--margin must be positive" in zero
    assert "hinge" in unknown and "hinge" in compared
    assert json.loads((folder / "out/run/config.json").read_text())["margin"] == 2
    rows = (folder / "out/run/log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["loss"] > 0


def test_a_task(project):
    folder, insert, run = project
    function, row = blocks("docs/changing.md", "A task")
    insert("tasks.py", "class TaskRow(NamedTuple):", function + "\n\n")
    add_row(insert, "tasks.py", "TASKS", row)
    told, chess, *_ = run(
        "--help",
        "!--task chess",
        f"--task echo {SMALL} --eval-samples 8 --out out/run",
        "--task echo --layers 1 --width 16 --eval-prompts 2 --eval-samples 8 --out out/own",
    )
    assert "echo" in told and "choose from echo, dialogue" in chess
    metrics = json.loads((folder / "out/run/metrics.json").read_text())
    assert metrics["policy_reward"] is not None and metrics["ood_kl"] is not None
    config = json.loads((folder / "out/own/config.json").read_text())
    assert (config["steps"], config["reference_steps"]) == (100, 200)  # of the row


SPARSEMAX = """
import doctest
import torch
import lire

g = torch.Generator().manual_seed(0)
for B, M in ((2, 3), (5, 7), (3, 1)):
    logps = torch.randn(B, M, generator=g, dtype=torch.float64).requires_grad_()
    rewards = torch.randn(B, M, generator=g, dtype=torch.float64)
    mask = torch.rand(B, M, generator=g) < 0.7
    P = lire.candidate_probs(logps, mask, 1.5)
    assert torch.allclose(P.sum(-1), mask.any(-1).double()) and (P >= 0).all()
    (expected,) = torch.autograd.grad(lire.lire_loss(logps, rewards, mask, 1.5).sum(), logps)
    assert torch.allclose(lire.lire_grad(logps, rewards, mask, 1.5), expected)
assert (P == 0).any() and doctest.testmod(lire).failed == 0
"""


def test_another_distribution(project):
    folder, _, run = project
    text = (ROOT / "docs/changing.md").read_text()
    shutil.copy(ROOT / "README.md", folder)
    (folder / "sparsemax.diff").write_text(re.search(r"```diff\n(.*?)```", text, re.S)[1])
    subprocess.run(["git", "apply", "sparsemax.diff"], cwd=folder, check=True)
    done = subprocess.run([sys.executable, "-c", SPARSEMAX], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    run(f"--task tiny {SMALL} --evolve 1 --out out/run")
    rows = (folder / "out/run/log.jsonl").read_text().splitlines()
    assert 0 < json.loads(rows[-1])["candidates/max_prob"] <= 1
    for path in ("lire.py", "README.md"):  # nothing is left of a softmax over log-probabilities
        lines = (folder / path).read_text().splitlines()
        assert not [x for x in lines if "softmax(logps" in x and "sparsemax(logps" not in x]


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
    del votes[3]["votes_b"]
    (folder / "wrong.jsonl").write_text("".join(json.dumps(r) + "\n" for r in votes))
    said, wrong, _ = run(
        f"--data votes.jsonl --vocab-size 300 {SMALL} --out out/run", "!--data wrong.jsonl"
    )
    title = "votes.jsonl: answers with votes, 60 prompts, 120 responses; best of record 1: 'No.'"
    assert title in said and "wrong.jsonl:4: no field 'votes_b'" in wrong


def test_the_loss_in_another_trainer():
    [example] = blocks("docs/changing.md", "Another trainer")
    names = {}
    exec(example, names)
    assert names["logps"].grad.abs().sum() > 0 and names["logps"].grad.sum().abs() < 1e-6
