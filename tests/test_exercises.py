"""The classroom: solutions pass, skeletons have not started, wrong answers are told why."""

import ast
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT

import train
from exercises import check, fence, judge
from exercises.judge import Wrong
from experiments.mutants import read_mutants
from harness.config import resolve

ANSWERS = ROOT / "tests" / "exercises"
WRITTEN = sorted(int(path.stem[2:4]) for path in (ROOT / "exercises").glob("ex??_*.py"))
WRONG = read_mutants((ANSWERS / "wrong.txt").read_text())


@pytest.fixture(scope="module", autouse=True)
def before_a_fork():
    torch.set_num_threads(1)
    if importlib.util.find_spec("matplotlib"):  # else every child would load it anew
        importlib.import_module("matplotlib").use("Agg")
        importlib.import_module("matplotlib.pyplot")


def checked(number, path, **settings):
    results, printed = check.check(number, path, **settings)
    return results, "\n".join(check.lines_of(number, results, printed))


def answer_with(folder, text):
    path = folder / "answer.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("number", WRITTEN)
def test_the_solution_has_all_points_and_the_skeleton_has_not_started(number):
    results, text = checked(number, ANSWERS / f"ex{number:02}.py")
    assert [r.state for r in results] == ["passed"] * len(results), text
    assert sum(r.points for r in results) == check.score_of(results) == 10
    results, text = checked(number, check.answer_path(number))
    assert {r.state for r in results} == {"not started"}, text
    assert text.endswith("not started (0 of 10 points)")


@pytest.fixture
def recorded(monkeypatch):
    """In place of a training of exercise 9 or 10 what it once gave; a child inherits it."""
    runs = json.loads((ANSWERS / "recorded.json").read_text())

    def main(config):
        c = resolve(config)
        run = runs["9" if c.tau else "10"]
        Path(c.out).mkdir(parents=True)
        (Path(c.out) / "log.jsonl").write_text("\n".join(map(json.dumps, run["rows"])))
        return run["metrics"]

    monkeypatch.setattr(train, "main", main)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda x: f"{Path(x.file).stem}: {x.name}")
def test_a_wrong_answer_is_told_what_is_wrong_with_it(wrong, recorded, tmp_path):
    solution = (ROOT / wrong.file).read_text()
    path = answer_with(tmp_path, solution.replace(wrong.old, wrong.new))
    results, text = checked(int(Path(wrong.file).stem[2:]), path)
    assert check.score_of(results) < 10
    assert wrong.name in text, text


@pytest.mark.parametrize("number", range(1, 10))  # 10 compares single numbers by itself
def test_no_sentence_waits_for_numbers_that_nobody_has(number, monkeypatch):
    """A mistake that is computed by a slip, or is none, would never be named."""
    found, usual = {}, judge.same

    def same(got, expected, mistakes=None, *given, **named):
        for sentence, numbers in (mistakes or {}).items():
            numbers = torch.as_tensor(numbers, dtype=torch.float64)
            right = torch.as_tensor(expected, dtype=torch.float64)
            other = numbers.shape != right.shape or not torch.allclose(numbers, right, atol=1e-4)
            found[sentence] = found.get(sentence) or other and not numbers.isnan().any()
        return usual(got, expected, mistakes, *given, **named)

    monkeypatch.setattr(judge, "same", same)
    checks = check.load(ROOT / "exercises" / "checks" / f"ex{number:02}.py", f"watched_{number}")
    answer = check.load(ANSWERS / f"ex{number:02}.py", "answer")
    for item in checks.PROPERTIES:
        if item.name != "a run in which V memorises":
            with np.errstate(all="ignore"):  # as the checker does
                item.holds(answer)
    assert found and [sentence for sentence, said in found.items() if not said] == []


@pytest.mark.parametrize("number", WRITTEN)
def test_wrong_answers_are_told_apart(number):
    names = [wrong.name for wrong in WRONG if Path(wrong.file).stem == f"ex{number:02}"]
    assert len(set(names)) == len(names) >= (3 if number in (4, 9, 10) else 6)


BAD = {
    "endless": (
        "import time\nwhile True:\n    time.sleep(1)",
        "did not end within 2 s: an endless loop?",
    ),
    "leaves": ("import os\nos._exit(3)", "the process ended by itself (exit code 3)"),
    "exits": ("raise SystemExit(1)", "line 1 ends the program"),
    "crash": ("1 / 0", "line 1 fails: ZeroDivisionError: division by zero"),
    "syntax": ("def f(:", "line 1 is no Python"),
    "import": ("import numpy\nfrom lire import lire_loss", "line 2 imports lire"),
    "sly": ("__import__('lire')", "line 1 imports lire, where the answer stands"),
    "empty": ("", "has no attribute 'candidate_probs': is the name as in the skeleton?"),
    "arguments": ("def candidate_probs(logps): return logps", "takes 1 positional argument"),
    "deep": ("def candidate_probs(*x): return candidate_probs(*x)", "line 1 fails: RecursionError"),
    "list": ("def candidate_probs(*x): return [1.0]", "a tensor is asked for, not a list"),
    "text": ("def candidate_probs(*x): return 'P'", "a tensor is asked for, not a str"),
    "debugger": (
        "def candidate_probs(*x): raise __import__('bdb').BdbQuit",
        "print instead of breakpoint()",
    ),
    "integers": (
        "def candidate_probs(x, *y): return x.long().softmax(-1)",
        "not implemented for 'Long': these are whole numbers, x.float() makes others of them",
    ),
    "mute": (
        "class Odd(Exception):\n    def __str__(self): 1 / 0\ndef candidate_probs(*x): raise Odd",
        "line 3 fails: Odd",
    ),
    "brackets": (f"x = {'-' * 10_000}1", "answer.py can't be read ("),
    "oracle": ("from exercises import oracle", "line 1 imports exercises.oracle, where the answer"),
    "loop": (
        "import time\ndef candidate_probs(*x):\n    while True: time.sleep(1)",
        "an endless loop?",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_answer_ends_in_a_sentence_and_not_in_a_traceback(kind, tmp_path):
    text, sentence = BAD[kind]
    results, said = checked(2, answer_with(tmp_path, text), limit=2.0)
    assert check.score_of(results) == 0 and len(results) == 6
    assert sentence in said and "Traceback" not in said and "check.py" not in said
    assert all(len(line) < 400 for line in said.splitlines())


needs_limits = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux limits the memory of a process"
)


@needs_limits
@pytest.mark.parametrize(
    "text, sentence",
    [
        ("while True: print('x' * 10**7)", "line 1 writes more than 64 MB: an endless loop?"),
        (
            "import torch\ndef candidate_probs(*x): return torch.empty(1500, 2**20)",
            "line 2 asks for more than 4 GB of memory: look at the shapes",
        ),
    ],
)
def test_neither_disk_nor_memory_is_filled(text, sentence, tmp_path):
    _, said = checked(2, answer_with(tmp_path, text), limit=20.0)
    assert sentence in said and len(said) < 3000


SPEC = "import importlib.util as u\ns = u.spec_from_file_location('x', PATH)\n"
READS = {
    "lire.py": "open(PATH).read()",
    "exercises/checks/ex02.py": SPEC + "s.loader.exec_module(u.module_from_spec(s))",
    "tests/exercises/ex02.py": "import pathlib\npathlib.Path(PATH).read_bytes()",
}


@pytest.mark.parametrize("name", READS)
def test_an_answer_does_not_read_where_the_answer_stands(name, tmp_path):
    text = READS[name].replace("PATH", repr(str(ROOT / name)))
    results, said = checked(2, answer_with(tmp_path, text))
    assert check.score_of(results) == 0
    assert f"reads {Path(name).name}, where the answer stands: write it here" in said
    assert fence.module_of(ROOT / "__pycache__" / "lire.cpython-312.pyc") == "lire"
    read = SPEC.replace("PATH", repr(str(ROOT / "baselines.py"))) + "s.loader.get_code('x')\n"
    solution = (ANSWERS / "ex02.py").read_text()
    results, _ = checked(2, answer_with(tmp_path, f"{read}open(__file__).read()\n{solution}"))
    assert check.score_of(results) == 0  # baselines.py holds it too
    results, _ = checked(1, answer_with(tmp_path, read + (ANSWERS / "ex01.py").read_text()))
    assert check.score_of(results) == 10  # for exercise 1 it is a file like any other


CHANGES = (
    "open(PATH, 'a').write('x = 1')",
    "import os\nos.remove(PATH)",
    "import os\nos.rename(PATH, PATH + '.old')",
    "import os\nopen(PATH + '.new', 'w').close()\nos.replace(PATH + '.new', PATH)",
    "import os\nos.close(os.open(PATH, os.O_RDWR | os.O_TRUNC))",
    "import os\nos.truncate(PATH, 0)",
)


@pytest.mark.parametrize("text", CHANGES)
def test_no_answer_changes_the_files_of_the_course(text, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    file = hidden / "ex01.py"
    before = (ROOT / "exercises" / "checks" / "ex01.py").read_text()
    file.write_text(before)
    text = text.replace("PATH", repr(str(file))) + "\n" + (ANSWERS / "ex01.py").read_text()
    results, said = checked(1, answer_with(tmp_path, text), checks=hidden)
    assert check.score_of(results) == 0 and "changes ex01.py, a file of the course" in said
    assert file.read_text() == before
    own = f"open({str(tmp_path / 'own.txt')!r}, 'w').write('mine')\n"  # and this is no such file
    results, _ = checked(1, answer_with(tmp_path, own + (ANSWERS / "ex01.py").read_text()))
    assert check.score_of(results) == 10 and (tmp_path / "own.txt").read_text() == "mine"


def test_the_folder_of_the_course_is_not_removed(tmp_path):
    text = f"import shutil\nshutil.rmtree({str(ROOT / 'exercises' / 'not there')!r})"
    _, said = checked(1, answer_with(tmp_path, text))
    assert "line 2 changes not there, a file of the course: leave it as it is" in said


def test_what_an_answer_leaves_behind_holds_nothing_up(tmp_path):
    late = tmp_path / "late"
    text = "import subprocess, threading, time\n"
    text += "threading.Thread(target=time.sleep, args=(40,)).start()\n"
    text += f"subprocess.Popen(['sh', '-c', 'sleep 1; echo > {late}'])\nprint('begun', end='')\n"
    began = time.monotonic()
    results, said = checked(1, answer_with(tmp_path, text + (ANSWERS / "ex01.py").read_text()))
    assert check.score_of(results) == 10 and "begun" in said and time.monotonic() - began < 20
    time.sleep(1.5)
    assert not late.exists() or sys.platform == "win32"


def test_an_endless_answer_is_stopped_by_the_keyboard(tmp_path):
    text = f"open({str(tmp_path / 'begun')!r}, 'w').close()\nwhile True: pass"
    words = ["-m", "exercises.check", "1", "--file", str(answer_with(tmp_path, text))]
    check_ = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists() and check_.poll() is None:
        time.sleep(0.05)
    check_.send_signal(signal.SIGINT)
    _, said = check_.communicate(timeout=20)
    assert said == "stopped\n" and check_.returncode == 1


def test_without_fork_a_child_starts_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(check.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(torch, "inherited", True, raising=False)
    text = (ANSWERS / "ex07.py").read_text() + "print(hasattr(torch, 'inherited'))\n"
    results, said = checked(7, answer_with(tmp_path, text))
    assert check.score_of(results) == 10 and "it printed:\n    False" in said


def test_an_exercise_whose_file_is_missing_costs_its_own_points(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "FOLDER", tmp_path)
    results, said = checked(7, None, checks=ROOT / "exercises" / "checks")
    assert check.score_of(results) == 0 and "can't be read (FileNotFoundError)" in said
    assert "exercise 7, file is missing: 0 of 10 points" in said
    for name in ("ex07_optimum copy.py", "ex07_optimum.py", "ex07_optimum_old.py"):
        (tmp_path / name).touch()
    assert check.answer_path(7).name == "ex07_optimum.py"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    text = "\ufeff" + (ANSWERS / "ex07.py").read_text()
    path = tmp_path / "answer.py"
    path.write_text(text, encoding="utf-8")
    assert check.score_of(checked(7, path)[0]) == 10


def test_whatever_is_printed_can_be_shown(tmp_path, monkeypatch):
    text = "print('\\x1b[2Jcleared \\ud800 \u03c0')\n" + (ANSWERS / "ex01.py").read_text()
    path = tmp_path / "answer.py"
    path.write_text(text, encoding="utf-8")
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert check.main(["1", "--file", str(path)]) == 0
    assert b"    [2Jcleared ? ?\n" in terminal.buffer.getvalue()


def test_a_property_that_never_ends_does_not_cost_those_before_it(tmp_path):
    solution = (ANSWERS / "ex07.py").read_text()
    endless = solution.replace("    return values + c, logps", "    __import__('time').sleep(99)")
    results, _ = checked(7, answer_with(tmp_path, endless), limit=2.0)
    assert [r.state for r in results] == ["passed"] * 4 + ["wrong"] * 2


def test_what_an_answer_prints_is_shown_shortened_and_changes_nothing(tmp_path):
    solution = (ANSWERS / "ex01.py").read_text()
    text = solution.replace(
        "    logps = logits", "    print('shape', logits.shape)\n    logps = logits"
    )
    results, said = checked(1, answer_with(tmp_path, text))
    assert check.score_of(results) == 10 and "it printed:\n    shape torch.Size([1, 3, 3])" in said
    results, said = checked(
        1, answer_with(tmp_path, "print('x' * 10**6)\nprint('y\\n' * 50)\n" + text)
    )
    assert check.score_of(results) == 10 and "lines more" in said and len(said) < 2500


def test_no_answer_changes_what_another_gets(tmp_path):
    spoils = "import numpy, sys, torch\ntorch.logsumexp = torch.softmax = torch.where = None\n"
    spoils += "numpy.allclose = lambda *x, **y: True\nsys.path.clear()\n"
    checked(1, answer_with(tmp_path, spoils))
    results, _ = checked(7, ANSWERS / "ex07.py")
    assert check.score_of(results) == 10 and torch.logsumexp is not None
    assert not np.allclose(0, 1) and sys.path


def test_without_matplotlib_the_picture_is_left_out_and_not_begun_is_not_passed(tmp_path):
    absent = 'import sys\nsys.modules["matplotlib"] = None\n'
    results, said = checked(4, answer_with(tmp_path, absent + (ANSWERS / "ex04.py").read_text()))
    assert check.score_of(results) == 10 and "the picture was not checked" in said
    skeleton = check.answer_path(4).read_text()
    results, _ = checked(4, answer_with(tmp_path, skeleton + absent))
    assert {r.state for r in results} == {"not started"}


def test_predictions_are_shown_beside_what_comes_out_once_the_simulation_works(tmp_path):
    solution = (ANSWERS / "ex04.py").read_text()
    _, said = checked(4, answer_with(tmp_path, solution))
    assert "sums,  predicted      0.90" in said and "means, simulated " in said
    _, said = checked(4, answer_with(tmp_path, solution.replace("1: 0.9", "1: None")))
    assert "means, simulated" not in said
    _, said = checked(
        4, answer_with(tmp_path, solution.replace("(scores / temp", "(scores * temp"))
    )
    assert "means, simulated" not in said


IN_PLACE = {
    1: ("    logps = logits[", "    ids[~mask] = 0\n    logps = logits["),
    3: ("    P = (logps / temp", "    rewards *= 1\n    P = (logps / temp"),
    7: ("    return values + c", "    values += c\n    return values"),
}


@pytest.mark.parametrize("number", IN_PLACE)
def test_a_change_in_place_costs_no_points_and_is_told(number, tmp_path):
    solution = (ANSWERS / f"ex{number:02}.py").read_text()
    results, said = checked(number, answer_with(tmp_path, solution.replace(*IN_PLACE[number])))
    assert check.score_of(results) == 10, said
    assert "changes a tensor that it is given: see exercise 6, program D" in said
    output = check.report_of({number: results})["tests"][4 if number == 3 else 0]["output"]
    assert output in ("passed", said.split("\n      ")[1].split("\n")[0])


def test_a_change_that_mends_nothing_is_not_taken_for_no_change(tmp_path):
    skeleton = check.answer_path(6).read_text()
    other = skeleton.replace(
        "    mask = place < lengths[:, None]", "    mask = lengths[:, None] > place"
    )
    assert other != skeleton
    results, said = checked(6, answer_with(tmp_path, other))
    assert [r.state for r in results].count("wrong") == 1
    assert "the result is what it was: the bug is elsewhere" in said and "the prompt" not in said
    other = skeleton.replace(
        "    losses = cross_entropy(", "    # why?\n    losses = cross_entropy("
    )
    results, _ = checked(6, answer_with(tmp_path, other))
    assert {r.state for r in results} == {"not started"}


def test_a_detach_that_is_missing_costs_one_property(tmp_path):
    solution = (ANSWERS / "ex08.py").read_text()
    results, said = checked(
        8,
        answer_with(
            tmp_path, solution.replace("ref_logps.detach(), rewards.d", "ref_logps, rewards.d")
        ),
    )
    assert check.score_of(results) == 8 and "expected  no gradient at ref_logps" in said


def test_the_descent_of_exercise_8_ends_where_its_text_and_the_right_answers_say(capsys):
    path = check.answer_path(8)
    end_point = check.load(path, "exercise_8").end_point
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    for tau in (0.1, 0.5, 1.0, 2.0, 5.0):
        best = (mu.log() + rewards / tau).softmax(-1)
        derived, printed = end_point(tau, tau / 2), end_point(tau, 0.5)
        assert torch.allclose(derived, best, atol=1e-4)  # DERIVED_AT_TWO
        assert torch.allclose(printed, best, atol=1e-4) == (tau == 1)  # AGREE_AT_TAU
        if tau < 1:  # PRINTED_AT_HALF
            assert mu[0] < printed[0] < best[0] and mu[2] > printed[2] > best[2]
        if tau == 0.1:
            for end in (derived, printed):
                shown = ", ".join(f"{p:.4f}".removeprefix("0") for p in end)
                assert f"({shown})" in path.read_text()
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split()[-1]) > 1e9  # PRINTED_AT_FIVE: V grows without end


def test_exercise_8_runs_by_the_command_in_it():
    text = check.answer_path(8).read_text()
    [words] = re.findall(r"^    python (-m exercises\.ex08_dro_losses \S+ \S+)", text, re.M)
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert "pi 0.7547 0.1942 0.0511" in done.stdout.splitlines()[-1], done.stderr


def test_what_a_text_was_given_for_a_number_is_shown_as_a_text(tmp_path):
    solution = (ANSWERS / "ex08.py").read_text()
    _, said = checked(8, answer_with(tmp_path, solution.replace("TAU = 1.0", 'TAU = "1"')))
    assert "got       '1'" in said


def test_a_run_of_exercise_9_in_which_v_has_not_memorised_is_told_why():
    checks = check.load(ROOT / "exercises" / "checks" / "ex09.py", "checks_of_9")
    rows = [{"residual/rms": 0.9, "residual/within_prompt": 0.9}] * 4
    causes = []
    for value_lr in (10.0, 1e-2, 1e-3):
        with pytest.raises(Wrong) as told:
            checks.verdict(rows, value_lr)
        causes.append(told.value.cause)
    assert "value_lr 10 is too high" in causes[0]
    assert causes[1].endswith("more steps") and causes[2].endswith("or a higher value_lr")


def test_what_is_not_set_in_exercise_9_is_what_its_text_says(monkeypatch):
    checks = check.load(ROOT / "exercises" / "checks" / "ex09.py", "checks_of_9")
    text = check.load(check.answer_path(9), "exercise_9").settings.__doc__
    said = re.findall(r"^    (\w+) +(\S+)  ", text, re.M)
    assert {name: ast.literal_eval(value) for name, value in said} == checks.START
    runs = []

    def run_quietly(config):
        runs.append(resolve(config))
        raise train.ConfigError("seen")

    monkeypatch.setattr(checks, "run_quietly", run_quietly)
    own = {"candidates": 1, "lr": 1e-9, "value_lr": 2e-3}
    with pytest.raises(Wrong):
        checks.run(SimpleNamespace(settings=lambda: own))
    [c] = runs
    expected = checks.START | own | {"batch_size": 16, "iterate": 1}
    assert {name: getattr(c, name) for name in expected} == expected


def test_exercise_10_without_its_line_for_a_loss_is_lires(recorded, tmp_path):
    solution = (ANSWERS / "ex10.py").read_text()
    _, said = checked(10, answer_with(tmp_path, solution.replace("loss = None\n", "")))
    assert "mean efficiency" in said and "no attribute" not in said


def test_the_advice_of_exercise_10_fits_what_was_tried():
    advice = check.load(ROOT / "exercises" / "checks" / "ex10.py", "checks_of_10").advice
    warm = {"sample_temperature": 1.0, "candidates": 16}
    assert "the sign of your loss is turned" in advice({}, True, -0.43)
    assert "nearly one-hot" in advice(warm, False, 0.3)
    assert "too high" in advice(warm | {"lr": 0.1}, False, -0.2)
    assert "hardly move" in advice({"lr": 1e-4, "temperature": 0.05}, False, 0.0)
    assert "one-hot at T = 0.05" in advice({"temperature": 0.05}, False, 0.16)
    assert "more rounds, or another reward_norm" in advice(warm, False, 0.49)
    own = [advice(warm, True, x) for x in (0.1, 0.49)]
    assert not re.search("reward_norm|sft_weight|this T", " ".join(own))


@pytest.mark.parametrize("way", ["jvp", "backward"])
def test_autograd_is_noticed_in_every_shape(way, tmp_path):
    ways = {
        "jvp": "torch.func.jvp(gain, (margin,), (torch.ones_like(margin),))[1]",
        "backward": "[s := margin.clone().requires_grad_(), gain(s).sum().backward()][0].grad",
    }
    solution = (ANSWERS / "ex05.py").read_text()
    old = "    return P_w * P_l * math.tanh(reward_gap / 2) / temperature"
    new = "    gain = lambda x: torch.sigmoid(x / temperature) * math.tanh(reward_gap / 2)\n"
    results, said = checked(
        5, answer_with(tmp_path, solution.replace(old, new + f"    return {ways[way]}"))
    )
    assert "autograd is used: here the derivative is worked out on paper" in said
    assert [r.state for r in results[:2]] == ["wrong", "wrong"] and results[2].state == "passed"


def test_the_report_is_what_autograders_read(tmp_path, capsys):
    path = tmp_path / "results.json"
    argv = ["7", "--file", str(ANSWERS / "ex07.py"), "--report", str(path)]
    assert check.main(argv) == 0
    report = json.loads(path.read_text())
    assert report["score"] == sum(test["max_score"] for test in report["tests"]) == 10
    assert {test["status"] for test in report["tests"]} == {"passed"}
    assert {"name", "score", "max_score", "output"} <= set(report["tests"][0])
    assert check.main(["7", "--report", str(path)]) == 1
    report = json.loads(path.read_text())
    assert report["score"] == 0 and report["tests"][0]["output"] == "not started"
    assert "exercise 7" in capsys.readouterr().out


def test_all_exercises_end_with_their_sum(monkeypatch, capsys):
    monkeypatch.setattr(check, "NUMBERS", (1, 7))
    assert check.main(["all"]) == 1
    assert capsys.readouterr().out.endswith("all exercises: 0 of 20 points\n")


def test_the_lines_of_a_message_begin_alike_in_the_report(tmp_path):
    results, _ = checked(2, answer_with(tmp_path, "def candidate_probs(*x): return 1.0"))
    (output, *_) = (test["output"] for test in check.report_of({2: results})["tests"])
    assert [line.split()[0] for line in output.splitlines()] == ["expected", "got", "likely"]
    assert not any(line.startswith(" ") for line in output.splitlines())


def test_the_file_runs_from_any_folder_and_into_a_pipe_that_closes(tmp_path):
    command = [sys.executable, str(ROOT / "exercises" / "check.py"), "1"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=tmp_path, env=clean, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_hidden_checks_stand_in_for_the_public_ones(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    text = (ROOT / "exercises" / "checks" / "ex07.py").read_text()
    (hidden / "ex07.py").write_text(text.replace('"the worked example", 2', '"hidden", 5'))
    results, _ = checked(7, ANSWERS / "ex07.py", checks=hidden)
    assert results[0][:3] == ("hidden", 5, "passed") and check.score_of(results) == 13


@pytest.mark.parametrize(
    "argv, message",
    [
        (["11"], "invalid choice"),
        (["all", "--file", "x.py"], "--file is the answer to one exercise"),
        (["1", "--file", "nowhere.py"], "nowhere.py: no such file"),
        (["1", "--file", str(ROOT)], "it is a folder"),
        (["1", "--report", "nowhere/x.json"], "nowhere/x.json: its folder does not exist"),
        (["1", "--report", str(ROOT)], "it is a folder"),
        (["1", "--checks", "nowhere"], "nowhere has no ex01.py"),
    ],
)
def test_impossible_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        check.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", WRITTEN)
def test_a_skeleton_says_how_it_is_checked_and_what_is_to_be_written(number):
    text = check.answer_path(number).read_text()
    assert f"python -m exercises.check {number}" in text and "worked example" in text
    assert re.match(rf'"""Exercise {number} \(\w+', text)
    source = re.search(r"arXiv\s\d{4}\.\d{5}", text) and re.search(r"Eq\. \d|Algorithm \d", text)
    assert source or number == 1  # there it is the chain rule
    assert f'raise NotImplementedError("exercise {number}: ' in text


def test_the_page_of_the_exercises_names_what_is_there():
    page = (ROOT / "exercises" / "README.md").read_text()
    named = re.findall(r"^\| (\d+) \| `(ex\d\d_\w+\.py)` \|", page, re.M)
    assert [(int(number), name) for number, name in named] == [
        (number, check.answer_path(number).name) for number in check.NUMBERS
    ]
    shown = re.findall(r"!\[\w+\]\(\.\./(assets/lecture/\w+\.png)\)", page)
    drawn = sorted(path.stem for path in (ROOT / "assets" / "lecture").glob("*.png"))
    assert sorted(Path(path).stem for path in shown) == drawn
    for path in re.findall(r"\]\(\.\./([^)]+)\)", page):
        assert (ROOT / path).exists()
    minutes = dict(re.findall(r"^\| (\d+) \| `\S+` \| [^|]+ \| (\d+)", page, re.M))
    for number in check.NUMBERS:
        said = re.search(r"(\d+) minutes", check.answer_path(number).read_text())[1]
        assert minutes[str(number)] == said and 15 <= int(said) <= 30
