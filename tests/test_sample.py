"""Answers of a finished run; and what a terminal may do to the scripts that print."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import LISTS, ROOT, checkpoint, flags, write

from data import DataError
from experiments import sample
from harness import run
from harness.config import ConfigError

PROMPT = "What is the sea like?"


@pytest.fixture(scope="module")
def copied(finished, tmp_path_factory):
    """A copy of the finished run; each test puts back what it damages."""
    folder = tmp_path_factory.mktemp("sample") / "run"
    shutil.copytree(finished[0], folder)
    return folder


def test_answers_are_of_both_models_and_follow_their_seed(copied):
    text = sample.answers(str(copied), PROMPT, 3)
    who = [line.split()[0] for line in text.splitlines()]
    assert who == ["What", *["reference"] * 3, *["policy"] * 3]
    assert (
        text == sample.answers(str(copied), PROMPT, 3) != sample.answers(str(copied), PROMPT, 3, 1)
    )
    assert "no reward for this prompt" in sample.answers(str(copied), "calm deep", 1)
    with pytest.raises(DataError, match="the prompt '' has no token"):
        sample.answers(str(copied), "", 1)
    with pytest.raises(ConfigError, match="no checkpoint.pt in it"):
        sample.answers(str(copied / "nothing"), PROMPT, 1)


def test_damaged_files_of_a_run_are_one_line(copied):
    narrow = checkpoint(copied)
    narrow["policy"] = {name: value[..., :1] for name, value in narrow["policy"].items()}
    narrow.pop("digest")
    narrow["digest"] = run.digest_of(narrow)
    other = torch.load(copied / "reference.pt", weights_only=True)
    other["wte.weight"][0, 0] += 1
    config = json.loads((copied / "config.json").read_text())
    damages = {
        "checkpoint.pt": [b"", b"x", [], narrow],
        "reference.pt": [b"", [], other],
        "config.json": [b"", b"null", json.dumps({**config, "width": "x"}).encode()],
        "model.json": [b"", b"null", b'{"model": "gpt", "wide": 1}'],
        "tokenizer.txt": [b"\xff", b"x", b"IQ== x\n"],
    }
    for name, contents in damages.items():
        whole = (copied / name).read_bytes()
        for content in contents:
            if isinstance(content, bytes):
                (copied / name).write_bytes(content)
            else:
                torch.save(content, copied / name)
            with pytest.raises((ConfigError, DataError), match=r"damaged|differ") as error:
                sample.answers(str(copied), PROMPT, 1)
            assert "\n" not in str(error.value)
        (copied / name).write_bytes(whole)
    assert sample.answers(str(copied), PROMPT, 1)


# -------------------------------------------------------------------------------------- terminals

PLAIN = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "LC_ALL": "C"}
WAYS = {"ascii": "{}", "closed": "{} >&-", "head": "{} | head -1", "full": "{} > /dev/full"}


CASES = [(script, way) for script in ("sample", "train") for way in ("ascii", "closed", "head")]


@pytest.mark.parametrize("script, way", [*CASES, ("help", "head"), ("help", "full")])
def test_no_terminal_ends_a_script_with_a_traceback(copied, tmp_path, script, way):
    if script == "sample":
        # So many answers are more than a pipe holds.
        command = f"-m experiments.sample {copied} --prompt '{PROMPT} caf\u00e9' -n 3000"
    elif script == "help":
        command = "train.py --help"
    else:
        lists = [{**row, "responses": [f"\u00e9 {y}" for y in row["responses"]]} for row in LISTS]
        own = {"data": write(tmp_path, *lists), "steps": 0, "reference_steps": 1}
        settings = flags(tmp_path / "run", **own, vocab_size=300, max_response=8, evolve=0)
        settings = " ".join(settings).replace("--task tiny ", "")
        command = f"train.py {settings}"
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + WAYS[way].format(f"{sys.executable} {command}")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **PLAIN, "PYTHONCOERCECLOCALE": "0"},
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.stdout.isascii() and bool(done.stdout) == (way in ("ascii", "head"))
    assert not done.stderr or way == "full"
    if way in ("ascii", "closed"):
        assert done.returncode == 0
        assert script != "train" or (tmp_path / "run" / "metrics.json").exists()
