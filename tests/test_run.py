"""Whole runs: what they leave, nothing lost by a crash, a better policy at the end."""

import contextlib
import errno
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    LISTS,
    ROOT,
    SINGLES,
    THUMBS,
    checkpoint,
    failing,
    flags,
    generated,
    log,
    same,
    small,
    sources,
    untrained,
    weights,
    write,
)

import train
from data import DataError
from harness import pool, run
from harness.command_line import command_line
from harness.config import ConfigError, resolve
from harness.evaluation import list_metrics
from harness.pool import reward_list
from objectives import OBJECTIVES


def resume(folder, *options):
    return train.main(command_line(["--resume", str(folder), *options]))


# -------------------------------------------------------------------------------- what a run leaves


def test_a_run_writes_what_it_promises(finished):
    folder, metrics = finished
    promised = "config.json log.jsonl metrics.json samples.txt checkpoint.pt reference.pt"
    files = {path.name for path in folder.iterdir()}
    assert {*promised.split(), "tokenizer.txt", "frontier.json"} <= files
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    promised = """
        policy_reward reference_reward best_of_8_reward win_rate kl kl_se optimal_reward
        optimal_reward_se effective_sample_size efficiency policy_length reference_length
    """
    for name in promised.split():
        assert name in metrics and f"ood_{name}" in metrics
    assert metrics["seconds_train"] >= 0 and metrics["peak_memory_mb"] > 0
    assert not list(folder.glob("*.part"))


def test_a_half_written_file_never_takes_the_place_of_a_whole_one(tmp_path, monkeypatch):
    run.save("whole", tmp_path / "file")
    with pytest.raises(TypeError):
        run.save({"a": (lambda: None).__code__}, tmp_path / "file")  # nothing that torch can save
    assert (tmp_path / "file").read_text() == "whole"
    run.save({"step": 3}, tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True) == {"step": 3}
    run.save("a lone \ud800", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a lone ?"


@pytest.mark.parametrize("given, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_are_told_to_sleep_before_torch_is_loaded(tmp_path, given, expected):
    """It is read once, when torch loads its threads; what the user has set stands."""
    stand_in = "import os\nprint(os.environ.get('GOMP_SPINCOUNT'), flush=True)\nos._exit(0)\n"
    (tmp_path / "torch.py").write_text(stand_in)
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **given}
    command = [sys.executable, "-c", "import train"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == expected + "\n"


def test_importing_any_module_has_no_side_effect(tmp_path):
    names = list(sources())
    if not all(map(importlib.util.find_spec, ("transformers", "accelerate", "peft"))):
        names.remove("experiments.hf_trainer")  # names what is missing, and ends
    code = f"import {', '.join(names)}; import os; assert not os.listdir('.'), os.listdir('.')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_progress_is_a_line_where_there_is_something_to_say(capsys):
    progress, loss = run.Progress("lire", 10), torch.tensor(0.125)
    progress.show(5, loss, {"kl": 1.0, "reward": 2.5, "residual": None}, line=True)
    progress.show(6, None, {})  # nothing is asked of the loss, which a GPU may still work on
    said = capsys.readouterr().out
    assert re.fullmatch(r"lire 5/10  loss 0.1250  reward 2.50  kl 1.00  \d+ s left\n", said)


# ------------------------------------------------------------------------------------ every setting


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "summary"},
        {"sft_weight": 0.0, "score": "mean", "reward_norm": "zscore"},
        {"dtype": "bfloat16"},
        {"reward_norm": "global", "iterate": 2},
        {"shuffle_prompts": True},
        {"objective": "sft"},
    ],
    ids=str,
)
def test_every_option_runs(tmp_path, settings):
    metrics = train.main(small(tmp_path / "run", **{**settings, "reference_steps": 5, "steps": 4}))
    assert math.isfinite(metrics["policy_reward"]) and math.isfinite(metrics["kl"])
    if settings.get("objective") == "sft":
        assert metrics["kl"] == 0 and (tmp_path / "run" / "reference.pt").exists()
        assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("objective", ["lire", "dro", "dro-p", "kto", "sft"])
@pytest.mark.parametrize("task", ["summary", "tiny"])
def test_every_objective_and_task_runs_with_the_t5(tmp_path, objective, task):
    settings = {"task": task, "objective": objective, "model": "t5", "candidates": 2}
    sizes = {"reference_steps": 2, "steps": 2, "eval_prompts": 2, "eval_samples": 8}
    metrics = train.main(small(tmp_path / "run", **settings, **sizes))
    assert math.isfinite(metrics["policy_reward"]) and math.isfinite(metrics["kl"])


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "dro"},
        {"objective": "dro", "share_networks": True},
        {"objective": "dro", "value": "batch", "value_lr": 1e-3},
        {"objective": "dro", "candidates": 1, "model": "t5"},
        {"objective": "dro", "evolve": 0},
        {"objective": "dro", "dtype": "bfloat16", "model": "t5"},
        {"objective": "dro-p", "evolve": 2},
        {"objective": "kto", "beta": 1.0},
        {"objective": "kto", "desirable": "positive"},
    ],
    ids=str,
)
def test_every_setting_of_dro_and_kto_runs(tmp_path, settings):
    own = {"reference_steps": 5, "steps": 4, "evolve": None, **settings}
    metrics = train.main(small(tmp_path / "run", **own))
    assert math.isfinite(metrics["policy_reward"]) and math.isfinite(metrics["kl"])
    promised = {"rewards/implied", "rewards/correlation", "kl", "grad_norm"}
    if settings["objective"] == "dro":
        promised |= {"loss/policy", "loss/value", "residual/rms"}
        promised |= {"value/mean", "value/explained_variance"}
        assert metrics["value_error"] >= 0 and metrics["kl_from_optimum"] >= 0
    if settings["objective"] != "kto":
        promised |= {"residual/within_prompt"}
    assert promised <= set(log(tmp_path / "run")[-1])


def test_no_steps_is_the_reference_itself(tmp_path):
    assert train.main(small(tmp_path / "run", steps=0))["kl"] == 0


# ---------------------------------------------------------------------------------- a better policy


def test_a_short_run_improves_the_reward_on_prompts_never_trained_on(tmp_path):
    settings = {
        "reference_steps": 200,
        "steps": 100,
        "batch_size": 16,
        "reference_batch": 16,
        "eval_prompts": 20,
    }
    metrics = train.main(small(tmp_path / "run", **settings, width=64))
    assert metrics["policy_reward"] > metrics["reference_reward"] + 0.15
    assert metrics["win_rate"] > 0.55


def test_dro_improves_the_reward_and_learns_the_value(tmp_path):
    settings = {
        "reference_steps": 60,
        "steps": 200,
        "batch_size": 16,
        "reference_batch": 16,
        "eval_prompts": 20,
    }
    own = {"objective": "dro", "evolve": 1, "width": 64, "lr": 2e-3, "tau": 0.5}
    metrics = train.main(small(tmp_path / "run", **settings, **own))
    assert metrics["policy_reward"] > metrics["reference_reward"] + 0.3
    assert metrics["train_kl_from_optimum"] < 0.5 * metrics["train_optimum_kl"]


BASELINE = {
    "reference_steps": 30,
    "steps": 40,
    "lr": 3e-3,
    "eval_every": 40,
    "batch_size": 16,
    "reference_batch": 16,
    "eval_prompts": 16,
}


@pytest.mark.parametrize("name", ["dpo", "ipo", "pl-dpo", "rrhf", "slic", "pro", "rwr"])
def test_every_baseline_runs_from_nothing_and_improves_the_reward_it_trains_on(name, tmp_path):
    own = {"sft_weight": 0.0} if name in ("slic", "pro") else {}  # the ranking alone must do it
    metrics = train.main(small(tmp_path / "run", objective=name, **BASELINE, **own))
    assert metrics["train_policy_reward"] > metrics["train_reference_reward"] + 0.05


def test_the_ranking_of_rrhf_orders_its_lists_without_the_sft_term(tmp_path):
    """It has no margin, so that it hardly moves the policy, and alone earns nothing."""
    own = {"sft_weight": 0.0, "evolve": 1, "iterate": 10}
    train.main(small(tmp_path / "run", objective="rrhf", **BASELINE, **own))
    first, *_, last = log(tmp_path / "run")
    assert last["loss/rrhf"] < 0.5 * first["loss/rrhf"]


# ------------------------------------------------------------------------------------- nothing lost


def test_one_seed_gives_one_run_and_another_seed_another(finished):
    folder, _ = finished
    again, other = folder.parent / "again", folder.parent / "other"
    train.main(small(again))
    train.main(small(other, seed=1))
    assert same(weights(folder), weights(again))
    assert (folder / "log.jsonl").read_text() == (again / "log.jsonl").read_text()
    assert not same(weights(folder), weights(other))


@pytest.mark.parametrize("step", [1, 4, 5, 6, 7, 9, 12])
def test_a_run_cut_anywhere_resumes_to_the_same_bits(finished, step):
    """Rounds end at 6 and 12, checkpoints are at 4, 8 and 12; before the first it starts over."""
    folder, _ = finished
    cut = folder.parent / f"cut-{step}"
    with failing(step), pytest.raises(OSError, match="the machine is gone"):
        train.main(small(cut))
    resume(cut)
    assert same(weights(folder), weights(cut))
    assert (folder / "log.jsonl").read_text() == (cut / "log.jsonl").read_text()


@pytest.mark.parametrize(
    "own",
    [{"objective": "dro"}, {"objective": "dro", "share_networks": True}, {"objective": "kto"}],
    ids=str,
)
def test_dro_and_kto_resume_to_the_same_bits(tmp_path, own):
    settings = {**own, "steps": 8, "reference_steps": 5}
    train.main(small(tmp_path / "whole", **settings))
    with failing(6, own["objective"]), pytest.raises(OSError):
        train.main(small(tmp_path / "cut", **settings))
    resume(tmp_path / "cut", "--device", "auto")
    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    assert same(whole["policy"], cut["policy"])
    if own["objective"] == "dro":
        assert same(whole["value"], cut["value"])
        assert whole["reward_scale"] == cut["reward_scale"] and whole["reward_scale"][1] > 0


def started(folder, **settings):
    """A run in a process of its own, returned when its first checkpoint is there."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(folder, **settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3000):
        if (Path(folder) / "checkpoint.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


def test_kill_and_ctrl_c_both_resume_to_the_same_bits(tmp_path):
    long = {"steps": 160, "eval_every": 40}
    train.main(small(tmp_path / "whole", **long))
    for how, sent in (("killed", signal.SIGKILL), ("interrupted", signal.SIGINT)):
        process = started(tmp_path / how, **long)
        if how == "killed":
            process.send_signal(signal.SIGSTOP)  # it holds the folder as long as it is there
            refused(tmp_path / how, "is in use")
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
        assert checkpoint(tmp_path / how)["step"] < 160
        if how == "interrupted":
            assert process.returncode == 1 and "Traceback" not in said
            assert f"python train.py --resume {tmp_path / how}" in said
        resume(tmp_path / how)
        assert same(weights(tmp_path / "whole"), weights(tmp_path / how))


def test_ctrl_c_asks_to_stop_and_a_second_one_stops_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    with run.interruptible() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop and "stopping after the next step" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_in(tmp_path, monkeypatch, finished):
    row, calls = OBJECTIVES["lire"], []

    def loss(c, x):
        calls.append(1)
        if len(calls) == 7:  # the first is the trial before the run
            signal.raise_signal(signal.SIGINT)
        return row.loss(c, x)

    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, "lire", row._replace(loss=loss))
        with pytest.raises(KeyboardInterrupt, match="saved after step 6; .*--resume"):
            train.main(small(tmp_path / "run"))
    assert checkpoint(tmp_path / "run")["step"] == 6
    resume(tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(finished[0]))


def test_a_checkpoint_of_another_config_is_refused_with_the_difference(finished):
    folder, _ = finished
    with pytest.raises(ConfigError, match="temperature: 16.0 there, 1.0 here"):
        train.main(small(folder, resume=str(folder), temperature=1.0))
    with pytest.raises(ConfigError, match="holds a run already"):
        train.main(small(folder))
    file = folder / "log.jsonl"
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        train.main(small(file))


def plain(path):
    """What a file of JSON holds; nan and inf are no JSON, and no metric is a text."""

    def refuse(name):
        raise AssertionError(f"{name} in {path}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("factor, constant", [(math.nan, 0.0), (1.0, math.inf), (1.0, math.nan)])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_non_finite_loss_stops_the_run_whatever_its_gradient(
    tmp_path, monkeypatch, factor, constant, step
):
    row, calls = OBJECTIVES["lire"], []

    def loss(c, x):
        calls.append(1)
        losses = row.loss(c, x)
        if len(calls) == step + 1:  # one call was the trial before the run
            return {name: factor * part + constant for name, part in losses.items()}
        return losses

    monkeypatch.setitem(OBJECTIVES, "lire", row._replace(loss=loss))
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=f"step {step}: loss is (nan|inf), ") as error:
        train.main(small(folder))
    assert "\n" not in str(error.value) and not (folder / "metrics.json").exists()
    before = "it came before the first checkpoint" in str(error.value)
    kept = f"the last good checkpoint is kept in {folder}" in str(error.value)
    assert (
        (before, kept) == (step <= 4, step > 4) == (step <= 4, (folder / "checkpoint.pt").exists())
    )
    rows = plain(folder / "log.jsonl")
    assert [row["step"] for row in rows] == {1: [], 4: [1], 6: [1, 4]}[step]
    assert all(math.isfinite(row["loss"]) for row in rows)
    if kept:
        saved = checkpoint(folder)
        assert saved["step"] == 4
        assert all(parameter.isfinite().all() for parameter in saved["policy"].values())


def test_a_reference_that_leaves_the_finite_numbers_is_no_checkpoint_of_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="a smaller --reference-lr may help") as error:
        train.main(small(tmp_path / "run", reference_lr=1e9))
    assert "checkpoint" not in str(error.value)


def test_what_a_run_leaves_is_plain_json(finished):
    for name in ("log.jsonl", "frontier.json"):
        assert plain(finished[0] / name)
    metrics = json.loads((finished[0] / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert all(value is None or isinstance(value, (int, float)) for value in metrics.values())


# ------------------------------------------------------------------------ lists that teach nothing


def without_costs(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith(("seconds_", "peak_"))}


def test_candidates_and_ties_of_each_pool_are_in_the_log_and_of_the_last_in_the_metrics(finished):
    folder, metrics = finished
    c, world, _ = untrained()
    pairs = zip(world.rounds[1], generated(folder), strict=True)
    lists = [(e.prompt, ids) for e, ids in pairs]
    rewards = [reward_list(world, prompt, ids) for prompt, ids in lists]
    assert len(lists) == 6 * 4 and {len(ids) for _, ids in lists} == {8}
    distinct = sum(len({tuple(one) for one in ids}) / 8 for _, ids in lists) / len(lists)
    tied = sum(len(set(own)) == 1 for own in rewards) / len(lists)
    assert metrics["lists_distinct"] == pytest.approx(distinct) and 0 < distinct < 1
    assert metrics["lists_tied"] == tied
    rows = log(folder)
    names = ("lists/distinct", "lists/tied")
    of_round = [{tuple(r[name] for name in names) for r in rows if r["round"] == k} for k in (0, 1)]
    assert len(of_round[0]) == 1 and of_round[0] != of_round[1]
    assert of_round[1] == {(metrics["lists_distinct"], metrics["lists_tied"])}


def test_a_run_that_is_resumed_after_its_last_pool_has_the_same_metrics(copied, finished):
    resume(copied)  # no step is left
    (metrics,) = [json.loads((copied / "metrics.json").read_text())]
    assert without_costs(metrics) == without_costs(finished[1])
    assert (copied / "log.jsonl").read_text() == (finished[0] / "log.jsonl").read_text()


# ------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "copied"))


def refused(folder, message):
    """Resuming it ends with one line."""
    with pytest.raises(ConfigError, match=message) as error:
        resume(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_every_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(copied):
    path, saved = copied / "checkpoint.pt", checkpoint(copied)
    c, whole = resolve(command_line(["--resume", str(copied)])), path.read_bytes()
    digest = saved.pop("digest")
    assert digest == run.digest_of(saved) == run.digest_of(run.load_checkpoint(c, saved["key"]))
    harmless = 0
    for k in range(96):
        at = k * (len(whole) - 1) // 95
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << k % 8]) + whole[at + 1 :])
        try:
            assert run.digest_of(run.load_checkpoint(c, saved["key"])) == digest
            harmless += 1  # padding, or what says nothing about the content
        except ConfigError as e:
            assert "is damaged" in str(e) and "\n" not in str(e)
    assert harmless < 24


def test_the_digest_covers_every_part_of_a_checkpoint(copied):
    saved = checkpoint(copied)
    for name in set(saved) - {"digest"}:
        torch.save({**saved, name: {"something": "else"}}, copied / "checkpoint.pt")
        refused(copied, "checkpoint.pt is damaged .*does not match its digest")
    moments = saved["optimizer"]["state"][0]["exp_avg"]
    moments.view(-1)[0] += 1e-30
    torch.save(saved, copied / "checkpoint.pt")
    refused(copied, "does not match its digest")


def narrowed(value):
    """Tensors in it lose all but one number of each row."""
    if isinstance(value, dict):
        return {name: narrowed(item) for name, item in value.items()}
    return value[..., :1] if isinstance(value, torch.Tensor) and value.dim() else value


FORGED = {
    **{f"no {name}": (name, None) for name in run.PARTS},
    **{f"narrow {name}": (name, narrowed) for name in ("policy", "optimizer")},
    **{f"{name} of a text": (name, lambda value: "text") for name in run.PARTS},
    **{f"{name} of numbers": (name, lambda value: [1, 2]) for name in ("policy", "step", "key")},
    **{f"empty {name}": (name, lambda value: {}) for name in ("policy", "optimizer", "key")},
    "another reference": ("reference", lambda value: value[::-1]),
    "a step too many": ("step", lambda value: value + 1),
    "a huge step": ("step", lambda value: 2**70),
    "a negative step": ("step", lambda value: -1),
    "half a step": ("step", lambda value: 0.5),
    "a step of nan": ("step", lambda value: math.nan),
    "a step of a tensor": ("step", torch.tensor),
    "no step at all": ("step", lambda value: None),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_checkpoint_that_does_not_fit_is_refused_though_its_digest_is_right(copied, name):
    part, change = FORGED[name]
    saved = checkpoint(copied)
    saved.pop("digest")
    if change is None:
        saved.pop(part)
    else:
        saved[part] = change(saved[part])
    torch.save(saved | {"digest": run.digest_of(saved)}, copied / "checkpoint.pt")
    refused(copied, "damaged|does not fit|another config|data have changed")


@pytest.mark.parametrize(
    "content", [b"", b"x", 5, None, [], {}, {"step": 1}, torch.zeros(3), "text"], ids=repr
)
def test_a_checkpoint_that_is_none_is_refused(copied, content):
    path = copied / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(copied, "checkpoint.pt is damaged")
    if isinstance(content, dict):
        torch.save(content | {"digest": run.digest_of(content)}, path)
        refused(copied, "checkpoint.pt is damaged")


@pytest.mark.parametrize("cut", [1, 100, 1000, -1000, -1])
def test_a_checkpoint_of_half_a_file_is_refused(copied, cut):
    path = copied / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:cut])
    refused(copied, "checkpoint.pt is damaged")


@pytest.mark.parametrize(
    "lines, damaged",
    [
        ([b"\n"], 1),
        ([b"garbage\n"], 1),
        ([b"\xff\xfe\x00\n", b"\xc3\n"], 2),
        ([b'{"loss": 1}\n', b'{"step": "3"}\n', b'{"step": null}\n', b'{"step": 2.5}\n'], 4),
        ([b"[3]\n", b"3\n", b"null\n", b'"step"\n'], 4),
        ([b"[" * 100_000 + b"\n"], 1),
        ([b'{"step": 3, "lo\n'], 1),
        ([b'{"step": 13}\n'], 0),  # of a step that is to come
    ],
    ids=range(8),
)
@pytest.mark.parametrize("place", [0, 2, None])
def test_damaged_lines_of_the_log_are_left_out_and_counted(copied, capsys, lines, damaged, place):
    path = copied / "log.jsonl"
    whole = path.read_bytes()
    kept = whole.splitlines(keepends=True)
    place = len(kept) if place is None else place
    path.write_bytes(b"".join([*kept[:place], *lines, *kept[place:], b'{"step": 9, "evo']))
    run.Run(small(copied), {}, 0.0).start_log(12)
    assert path.read_bytes() == whole
    said = f"{path}: {damaged} damaged lines are left out\n" if damaged else ""
    assert capsys.readouterr().out == said


def test_a_full_disk_keeps_the_old_file_and_leaves_no_half_one(tmp_path, monkeypatch):
    path, big = tmp_path / "file", torch.ones(100_000)
    for before in (None, "old"):
        if before:
            run.save(before, path)
        for content in (big, "x" * 400_000):
            with small_disk(100_000), pytest.raises(OSError, match="file can't be written"):
                run.save(content, path)
            assert (path.read_text() if path.exists() else None) == before
            assert not list(tmp_path.glob("*.part"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name, raised in (("fsync", full), ("replace", full)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, raising(raised))
            with pytest.raises(OSError, match=r"can't be written \(.*No space left on device"):
                run.save("new", path)
        assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


@contextlib.contextmanager
def small_disk(most):
    """Inside, no file of this process becomes larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def raising(error):
    def fail(*given, **named):
        raise error

    return fail


def test_a_run_on_a_full_disk_ends_with_one_line(copied, tmp_path, monkeypatch, finished):
    script = lambda: train.main(small(tmp_path / "new", reference_steps=1))
    with small_disk(20_000), pytest.raises(SystemExit) as end:
        run.run_script("train.py", script)
    assert re.fullmatch(r"train.py: .*\.pt can't be written \(.*\)", end.value.code)
    # In the loop: the checkpoint of step 8 finds no room, that of step 4 stays.
    real, seen = torch.save, []

    def save(content, file):
        if "optimizer" in content:
            seen.append(content["step"])
        if seen == [4, 8]:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1\nmore")
        real(content, file)

    monkeypatch.setattr(torch, "save", save)
    script = lambda: train.main(small(tmp_path / "loop"))
    with pytest.raises(SystemExit) as end:
        run.run_script("train.py", script)
    assert re.fullmatch(r"train.py: .*checkpoint.pt can't be written \(.*pos 1\)", end.value.code)
    assert checkpoint(tmp_path / "loop")["step"] == 4 and not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    resume(tmp_path / "loop")
    assert same(weights(tmp_path / "loop"), weights(finished[0]))


def test_half_written_files_of_dead_processes_go_and_those_of_the_living_stay(copied):
    ended = subprocess.Popen(["true"])
    ended.wait()
    cache = copied.parent / "reference"
    cache.mkdir()
    dead, alive = (ended.pid, "x", "", 2**70, os.getpid()), (os.getppid(), 1)
    for folder in (copied, cache):
        for process in (*dead, *alive):
            (folder / f"some.pt.{process}.part").write_text("half")
    for path in copied.glob("checkpoint*"):
        path.unlink()  # it starts over, and asks the cache
    resume(copied)
    for folder in (copied, cache):
        left = {path.name for path in folder.glob("*.part")}
        assert left == {f"some.pt.{process}.part" for process in alive}


def test_two_runs_in_one_folder_and_the_second_is_refused(copied):
    with run.locked(copied):
        refused(copied, "is in use: another process is running in it")
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--resume", str(copied)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"train.py: {copied} is in use" in done.stderr
    resume(copied)


# ---------------------------------------------------------------------------------- files that move


def test_changed_data_are_refused_on_resume(tmp_path):
    path = write(tmp_path, *LISTS)
    train.main(small(tmp_path / "run", data=[path], steps=2, reference_steps=2))
    write(tmp_path, *LISTS[:-1])
    refused(tmp_path / "run", "data have changed")


def test_other_prompts_of_the_rounds_are_refused_on_resume(copied, monkeypatch):
    assert {"texts", "rounds"} <= set(checkpoint(copied)["key"])
    real = pool.round_prompts
    monkeypatch.setattr(pool, "round_prompts", lambda c, first, size: real(c, first + 1, size))
    refused(copied, "data have changed")
    monkeypatch.undo()
    resume(copied)


@pytest.mark.parametrize("held", [False, True])
def test_files_that_moved_are_taken_from_where_they_are(tmp_path, held):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    files = {"data": [write(there, *LISTS[7:40]), write(there, *LISTS[40:], name="more.jsonl")]}
    if held:
        files["eval_data"] = [write(there, *LISTS[:7], name="held.jsonl")]
    settings = {**files, "reference_steps": 2, "steps": 8, "max_response": 8}
    train.main(small(tmp_path / "whole", **settings))
    with failing(6), pytest.raises(OSError):
        train.main(small(tmp_path / "cut", **settings))
    for path in sorted(there.iterdir()):
        path.rename(here / path.name)
    moved = {name: [p.replace(str(there), str(here)) for p in own] for name, own in files.items()}
    options = [word for k, own in moved.items() for word in ("--" + k.replace("_", "-"), *own)]
    with pytest.raises(DataError, match="No such file"):
        resume(tmp_path / "cut")
    whole = (here / "more.jsonl").read_text()
    write(here, *LISTS[40:-1], name="more.jsonl")
    with pytest.raises(ConfigError, match="data have changed"):
        resume(tmp_path / "cut", *options)
    (here / "more.jsonl").write_text(whole)
    resume(tmp_path / "cut", *options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["data"] == moved["data"]
    resume(tmp_path / "cut")  # it knows the new path from now on


def test_a_run_from_other_sources_goes_on_and_says_that_it_may_differ(tmp_path, capsys):
    train.main(small(tmp_path / "run", steps=2, reference_steps=2))
    path = tmp_path / "run" / "checkpoint.pt"
    saved = checkpoint(tmp_path / "run")
    saved["key"]["model.py"] = "another"
    saved.pop("digest")
    run.save(saved | {"digest": run.digest_of(saved)}, path)
    resume(tmp_path / "run")
    assert "not bit by bit as it would have (model.py: 'another' there" in capsys.readouterr().out


def test_a_half_written_log_line_does_not_stop_a_resumed_run(finished):
    folder = finished[0].parent / "half"
    train.main(small(folder))
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 9, "evo')
    resume(folder)
    assert (folder / "log.jsonl").read_text() == (finished[0] / "log.jsonl").read_text()


def test_a_collapse_is_said_aloud_at_an_evaluation(tmp_path, monkeypatch, capsys):
    row = OBJECTIVES["lire"]
    monkeypatch.setitem(OBJECTIVES, "lire", row._replace(warning=lambda metrics: "mind the step"))
    train.main(small(tmp_path / "run", steps=12, reference_steps=1))
    said = re.findall(r"step (\d+): mind the step", capsys.readouterr().out)
    assert said == ["4", "8", "12"]  # the rows of steps 1 and 10 are no evaluation


# ---------------------------------------------------------------------------------------- own files


def test_files_train_and_report_list_metrics_on_held_out_prompts(tmp_path):
    path = write(tmp_path, *LISTS)
    metrics = train.main(small(tmp_path / "run", data=[path], lr=2e-3))
    scores = "policy_sum policy_mean policy_ratio reference_sum reference_mean longest".split()
    for name in scores:
        assert 0 <= metrics[f"top1_reward_{name}"] <= metrics["best_reward"] <= 1
    assert metrics["pair_accuracy_policy_mean"] > 0.9 and metrics["longer_accuracy"] == 1
    lines = (tmp_path / "run" / "heldout.jsonl").read_text().splitlines()
    own = list_metrics([json.loads(line) for line in lines])
    assert own == {name: metrics[name] for name in own}
    held = write(tmp_path, *LISTS[:5], name="held.jsonl")
    own = train.main(small(tmp_path / "own", data=[path], eval_data=[held]))
    assert own["best_reward"] == 1.0


@pytest.mark.parametrize("objective", ["dro", "dro-p", "kto"])
@pytest.mark.parametrize("rows", [SINGLES, THUMBS, LISTS], ids=["singles", "thumbs", "lists"])
def test_single_responses_thumbs_and_lists_train_dro_and_kto(tmp_path, objective, rows):
    folder, settings = tmp_path / "run", {"reference_steps": 2, "steps": 4}
    train.main(small(folder, data=[write(tmp_path, *rows)], objective=objective, **settings))
    expected = None
    if objective == "kto":
        expected = "positive" if rows is THUMBS else "mean"
    assert json.loads((folder / "config.json").read_text())["desirable"] == expected
    row = log(folder)[-1]
    assert math.isfinite(row["loss"]) and "rewards/correlation" in row


def test_lists_of_one_response_train_the_reference(tmp_path, capsys):
    single = [{**r, "responses": r["responses"][:1], "rewards": r["rewards"][:1]} for r in LISTS]
    path = write(tmp_path, *single)
    metrics = train.main(small(tmp_path / "run", objective="sft", data=[path]))
    assert metrics["kl"] == 0 and "top1_reward_longest" not in metrics
    assert "no list metrics" in capsys.readouterr().out


ALIKE = [{**row, "rewards": [1.0] * len(row["rewards"])} for row in LISTS]


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        (
            [{"prompt": "x", "responses": ["a"], "rewards": [1, 2]}],
            {},
            "lists.jsonl:1: 1 responses and 2 rewards",
        ),
        (SINGLES, {}, "every list here has a single response.*dro, dro-p, kto can"),
        ([LISTS[0]] * 5, {}, "expected some of both"),
        (ALIKE, {}, "no list has two responses of unlike reward.*nothing to learn"),
        (ALIKE, {"reward_norm": "global"}, "nothing to learn"),
        (ALIKE, {"objective": "dro"}, "every reward is 1.0: there is nothing to learn"),
        (
            [{**row, "label": True} for row in THUMBS],
            {"objective": "kto"},
            "none of these .. is undesirable",
        ),
        (
            [{**row, "label": False} for row in THUMBS],
            {"objective": "kto"},
            "none of these .. is desirable",
        ),
        (
            [{**row, "label": "up"} for row in THUMBS],
            {"objective": "kto"},
            "the label is 'up', expected true or false",
        ),
    ],
)
def test_data_that_teach_nothing_end_the_run_before_anything_is_written(
    tmp_path, rows, settings, message
):
    path = write(tmp_path, *rows)
    with pytest.raises((ConfigError, DataError), match=message) as error:
        train.main(small(tmp_path / "run", data=[path], **settings))
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["lists.jsonl"]


def test_lire_needs_a_list_with_unlike_rewards(tmp_path):
    """Every list is of one reward, though lists differ: there is nothing to compare in them."""
    rows = [{**row, "rewards": [float(i)] * len(row["rewards"])} for i, row in enumerate(LISTS)]
    with pytest.raises(ConfigError, match="nothing to compare"):
        train.main(small(tmp_path / "run", data=[write(tmp_path, *rows)]))


def test_responses_are_saved_flat_and_come_back_as_they_were():
    lists = [[[5, 6, 9], []], [[9], [7, 9]]]
    ids, lengths = run.flat(lists)
    assert ids.tolist() == [5, 6, 9, 9, 7, 9] and lengths.tolist() == [[3, 0], [1, 2]]
    assert run.nested(ids, lengths) == lists and run.nested(*run.flat([])) == []
