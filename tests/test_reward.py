"""A reward of one's own, --reward FILE.py:function: a file's prompts get what a task has."""

import json
from pathlib import Path

import pytest
from helpers import LISTS, failing, small, write

import train
from harness.config import Config, ConfigError, resolve
from harness.pool import make_world
from harness.reward import own_reward

KIND = '''
def kind(prompt: str, response: str) -> float:
    """Different kind words earn 1 each, an answer beyond 12 words nothing."""
    words = response.lower().split()
    return 0.0 if len(words) > 12 else float(len({"fine", "thank", "you"} & set(words)))
'''


@pytest.fixture
def files(tmp_path):
    """Lists, and a reward; both in a folder of their own."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "own.py").write_text(KIND)
    return write(folder, *LISTS), f"{folder / 'own.py'}:kind"


def run(folder, files, **settings):
    data, reward = files
    own = {"task": "dialogue", "vocab_size": 300, "max_response": 12, **settings}
    return train.main(small(folder, data=[data], reward=reward, **own))


def test_a_file_with_a_reward_has_rounds_and_is_measured_as_a_task(tmp_path, files, capsys):
    metrics = run(tmp_path / "run", files, evolve=3)
    told = capsys.readouterr().out
    assert "pool 3/3" in told and "policy_reward" in told and "(the task's units)" in told
    # best of 8, the optimum and its efficiency need a reward; so do the answers' own marks.
    for name in ("policy_reward", "reference_reward", "best_of_8_reward", "optimal_reward", "kl"):
        assert metrics[name] is not None
    assert "ood_policy_reward" not in metrics and "pair_accuracy_sum" not in metrics
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {row["round"] for row in rows} == {1, 2, 3} or {row["round"] for row in rows} == {
        0,
        1,
        2,
    }


def test_rounds_begin_with_the_files_prompts_and_none_is_held_out(files):
    data, reward = files
    c = resolve(small("unused", task="dialogue", data=[data], reward=reward, evolve=2, steps=20))
    world = make_world(c)
    prompts = {record["prompt"] for record in LISTS}
    held = {e.prompt for e in world.heldout}
    for lists in world.rounds:
        asked = [e.prompt for e in lists]
        assert len(asked) == len(set(asked)) == min(40, len(prompts - held))
        assert set(asked) <= prompts - held and not any(e.response_ids for e in lists)
    assert held and all(not e.response_ids for e in world.heldout)
    # What the reference learns from is the file's own lists.
    assert sum(len(e.response_ids) for e in world.logged) == sum(
        len(r["responses"]) for r in LISTS if r["prompt"] not in held
    )


def test_the_files_own_lists_are_rewarded_anew_with_evolve_0(tmp_path, files, capsys):
    run(tmp_path / "run", files, evolve=0)
    # "Fine, thank you." has "thank" alone ("fine," and "you." are other words); the others none.
    assert "reward 0." in capsys.readouterr().out
    (tmp_path / "one.py").write_text("def one(prompt, response):\n    return 1\n")
    data, _ = files
    with pytest.raises(ConfigError, match="nothing"):
        run(tmp_path / "dro", (data, f"{tmp_path / 'one.py'}:one"), evolve=0, objective="dro")


def test_defaults_are_those_of_a_task_in_rounds_and_candidates(files):
    data, reward = files
    for objective, evolve in (("lire", 10), ("dro", 1), ("dpo", 1)):
        c = resolve(Config(objective=objective, data=[data], reward=reward))
        assert (c.evolve, c.candidates, c.steps) == (evolve, 8, 250)
    assert resolve(Config(data=[data])).evolve == 0


def test_single_responses_will_do_where_lists_are_sampled(tmp_path, files):
    singles = write(
        tmp_path, *({**r, "responses": r["responses"][:1], "rewards": [1.0]} for r in LISTS)
    )
    assert run(tmp_path / "run", (singles, files[1]), evolve=2)["policy_reward"] is not None
    with pytest.raises(ConfigError, match="single response"):
        run(tmp_path / "own", (singles, files[1]), evolve=0)


BROKEN = {
    "no colon": ("own.py", "", "expected FILE.py:function"),
    "no .py": ("own.txt:kind", "def kind(p, r): return 1", "expected FILE.py:function"),
    "no file": ("absent.py:kind", "", "No such file"),
    "no function": ("own.py:unkind", "x = 1", "has no function unkind"),
    "not a function": ("own.py:x", "x = 1", "has no function x"),
    "a slip": ("own.py:kind", "x = 1\ndef kind(", "line 2: SyntaxError"),
    "an import that fails": ("own.py:kind", "\n\nimport no_such_module", "line 3: ModuleNotFound"),
    "it exits": ("own.py:kind", "exit(3)", "line 1: SystemExit"),
    "no text": ("own.py:kind", "\xe9", "own.py:kind: UnicodeDecodeError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_without_such_a_function_is_refused_in_one_line(tmp_path, case):
    named, source, what = BROKEN[case]
    (tmp_path / named.partition(":")[0].replace("absent", "own")).write_text(source, "latin-1")
    with pytest.raises(ConfigError, match="--reward") as e:
        own_reward(str(tmp_path / named))
    assert what in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) <= 300


RETURNS = {
    "nothing": ("return None", "it returned None"),
    "text": ("return '1'", "it returned '1'"),
    "a truth value": ("return True", "it returned True"),
    "nan": ("return float('nan')", "it returned nan"),
    "infinity": ("return 1e999", "it returned inf"),
    "an integer beyond all floats": ("return 10 ** 400", "it returned 1000"),
    "an exception": ("return 1 / (len(response) - 4)", "line 2: ZeroDivisionError"),
    "an exit": ("exit(1)", "line 2: SystemExit"),
}


@pytest.mark.parametrize("case", RETURNS)
def test_what_is_no_number_ends_with_a_line_that_names_the_response(tmp_path, case):
    body, what = RETURNS[case]
    (tmp_path / "own.py").write_text(f"def kind(prompt, response):\n    {body}\n")
    reward, _ = own_reward(f"{tmp_path / 'own.py'}:kind")
    with pytest.raises(ConfigError, match="--reward") as e:
        reward("How?", "Calm")
    assert what in str(e.value) and "'Calm'" in str(e.value) and len(str(e.value)) <= 300


def test_a_file_named_from_the_current_folder_has_its_line_named_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def kind(prompt, response):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match="own.py:kind: line 2: ZeroDivisionError: division"):
        own_reward("own.py:kind")[0]("How?", "Calm")
    # A call that does not fit the function fails outside of the file: there is no line to name.
    Path("own.py").write_text("def kind(response):\n    return 1\n")
    with pytest.raises(ConfigError, match="own.py:kind: TypeError: kind.. takes 1 positional"):
        own_reward("own.py:kind")[0]("How?", "Calm")


def test_a_slip_in_a_reward_shows_before_anything_is_written(tmp_path, files):
    (tmp_path / "own.py").write_text("def kind(response):\n    return 1\n")
    with pytest.raises(ConfigError, match="TypeError"):
        run(tmp_path / "run", (files[0], f"{tmp_path / 'own.py'}:kind"))
    assert not (tmp_path / "run").exists()


ARRAYS = """
from __future__ import annotations
from dataclasses import dataclass
import numpy, torch

@dataclass
class Kind:
    word: str

def f(prompt, response):
    value = len(response) + len(Kind("").word)
    return {"a": numpy.float32, "b": numpy.int64, "c": torch.tensor}[response[0]](value)

def g(prompt, response):
    return {"a": numpy.zeros(2), "b": numpy.bool_(True), "c": torch.tensor(float("nan"))}[response]
"""


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    (tmp_path / "own.py").write_text(ARRAYS)
    reward, _ = own_reward(f"{tmp_path / 'own.py'}:f")
    rewards = [reward("How?", response) for response in ("a", "bb", "ccc")]
    assert rewards == [1.0, 2.0, 3.0] and all(type(x) is float for x in rewards)
    reward, _ = own_reward(f"{tmp_path / 'own.py'}:g")
    for response, what in (("a", "ValueError"), ("b", "returned True"), ("c", "returned nan")):
        with pytest.raises(ConfigError, match=what):
            reward("How?", response)


def test_its_numbers_come_back_as_floats_and_lists_as_they_are(tmp_path):
    (tmp_path / "own.py").write_text("def size(prompt, response):\n    return len(response)\n")
    reward, source = own_reward(f"{tmp_path / 'own.py'}:size")
    assert reward("How?", "Calm") == 4.0 and isinstance(reward("How?", "Calm"), float)
    assert source == (tmp_path / "own.py").read_text()


def test_it_goes_with_files_and_not_with_a_task(tmp_path, files):
    with pytest.raises(ConfigError, match="--reward goes with --data"):
        resolve(Config(reward=files[1]))
    with pytest.raises(ConfigError, match="give one with --reward"):
        resolve(Config(data=[files[0]], evolve=2))


def test_a_resumed_run_is_held_to_the_source_and_not_to_its_place(tmp_path, files):
    whole = run(tmp_path / "whole", files)
    with failing(6), pytest.raises(OSError):
        run(tmp_path / "run", files)
    data, reward = files
    folder = tmp_path / "moved"
    folder.mkdir()
    own = folder / "own.py"
    own.write_text(KIND + "\n")
    resume = ["--resume", str(tmp_path / "run"), "--reward", f"{own}:kind"]
    with pytest.raises(ConfigError, match="its data have changed"):
        train.main(train.command_line(resume))
    own.write_text(KIND)
    again = train.main(train.command_line(resume))
    assert again["policy_reward"] == whole["policy_reward"] and again["kl"] == whole["kl"]
