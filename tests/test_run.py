"""Whole runs: what they leave, nothing lost by a crash, a better policy at the end."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import (
    LISTS,
    ROOT,
    SINGLES,
    THUMBS,
    checkpoint,
    failing,
    flags,
    log,
    same,
    small,
    sources,
    weights,
    write,
)

import train
from data import DataError
from harness import run
from harness.config import ConfigError, command_line
from harness.evaluation import list_metrics
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


def test_importing_any_module_has_no_side_effect(tmp_path):
    code = f"import {', '.join(sources())}; import os; assert not os.listdir('.'), os.listdir('.')"
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
    progress.show(6, loss, {})
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
    settings = {"reference_steps": 200, "steps": 100, "batch_size": 16, "eval_prompts": 20}
    metrics = train.main(small(tmp_path / "run", **settings, width=64))
    assert metrics["policy_reward"] > metrics["reference_reward"] + 0.15
    assert metrics["win_rate"] > 0.55


def test_dro_improves_the_reward_and_learns_the_value(tmp_path):
    settings = {"reference_steps": 60, "steps": 200, "batch_size": 16, "eval_prompts": 20}
    own = {"objective": "dro", "evolve": 1, "width": 64, "lr": 2e-3, "tau": 0.5}
    metrics = train.main(small(tmp_path / "run", **settings, **own))
    assert metrics["policy_reward"] > metrics["reference_reward"] + 0.3
    assert metrics["train_kl_from_optimum"] < 0.5 * metrics["train_optimum_kl"]


@pytest.mark.parametrize("name", ["dpo", "ipo", "pl-dpo", "rrhf", "slic", "pro"])
def test_every_baseline_runs_from_nothing_and_improves_the_reward_it_trains_on(name, tmp_path):
    settings = {"reference_steps": 30, "steps": 40, "lr": 3e-3, "eval_every": 40}
    if "sft_weight" in OBJECTIVES[name].defaults:
        settings["sft_weight"] = 0.0  # the ranking alone must do it
    sizes = {"batch_size": 16, "eval_prompts": 16}
    metrics = train.main(small(tmp_path / "run", objective=name, **sizes, **settings))
    assert metrics["train_policy_reward"] > metrics["train_reference_reward"] + 0.05


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
    long = {"steps": 240, "eval_every": 40}
    train.main(small(tmp_path / "whole", **long))
    for how, sent in (("killed", signal.SIGKILL), ("interrupted", signal.SIGINT)):
        process = started(tmp_path / how, **long)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
        assert checkpoint(tmp_path / how)["step"] < 240
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
    with pytest.raises(ConfigError, match="temperature: 4.0 there, 1.0 here"):
        train.main(small(folder, resume=str(folder), temperature=1.0))
    with pytest.raises(ConfigError, match="holds a run already"):
        train.main(small(folder))
    file = folder / "log.jsonl"
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        train.main(small(file))


def test_a_non_finite_loss_stops_with_the_last_good_checkpoint_kept(tmp_path, monkeypatch):
    row, calls = OBJECTIVES["lire"], []

    def loss(c, x):
        calls.append(1)
        factor = math.nan if len(calls) > 6 else 1.0  # one call was the trial before the run
        return {name: factor * part for name, part in row.loss(c, x).items()}

    monkeypatch.setitem(OBJECTIVES, "lire", row._replace(loss=loss))
    with pytest.raises(FloatingPointError, match="step 6: loss is nan.*last good checkpoint"):
        train.main(small(tmp_path / "run"))
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 4
    assert all(parameter.isfinite().all() for parameter in saved["policy"].values())


def test_a_damaged_checkpoint_ends_with_one_line(tmp_path):
    train.main(small(tmp_path / "run", steps=1, reference_steps=1))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="checkpoint.pt is damaged") as error:
        resume(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_changed_data_are_refused_on_resume(tmp_path):
    path = write(tmp_path, *LISTS)
    train.main(small(tmp_path / "run", data=[path], steps=2, reference_steps=2))
    write(tmp_path, *LISTS[:-1])
    with pytest.raises(ConfigError, match="data have changed"):
        resume(tmp_path / "run")


def test_a_run_from_other_sources_goes_on_and_says_that_it_may_differ(tmp_path, capsys):
    train.main(small(tmp_path / "run", steps=2, reference_steps=2))
    path = tmp_path / "run" / "checkpoint.pt"
    saved = checkpoint(tmp_path / "run")
    saved["key"]["model.py"] = "another"
    run.save(saved, path)
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
    metrics = train.main(small(tmp_path / "run", data=[path]))
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
        (SINGLES, {}, "every list here has a single response.*dro and kto can"),
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
            "'label' is 'up', expected true or false",
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
