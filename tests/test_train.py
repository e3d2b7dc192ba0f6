"""The run: nothing lost, nothing guessed, measured against the optimum. Small models, so that a run takes a second."""

import dataclasses
import importlib.util
import inspect
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

import data
import dro
import frontier
import tasks
import train
from train import Config, ConfigError

ROOT = Path(train.__file__).parent
SMALL = {
    "task": "tiny",
    "reference_steps": 40,
    "steps": 12,
    "evolve": 2,
    "batch_size": 4,
    "eval_prompts": 6,
    "eval_samples": 16,
    "eval_every": 4,
    "layers": 1,
    "heads": 2,
    "width": 32,
}


def small(folder, **settings) -> Config:
    return Config(**{**SMALL, "device": "cpu", "out": str(folder), **settings})


def flags(folder, **settings) -> list[str]:
    pairs = {**SMALL, "device": "cpu", "out": folder, **settings}
    return [x for k, v in pairs.items() for x in ("--" + k.replace("_", "-"), str(v))]


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["policy"]


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; its neighbours find its reference in the cache."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train.main(small(folder))


# ------------------------------------------------------------------------------------------------------------- what a run does


def test_a_run_writes_what_it_promises(finished):
    folder, metrics = finished
    assert {
        "config.json",
        "log.jsonl",
        "metrics.json",
        "samples.txt",
        "checkpoint.pt",
        "reference.pt",
        "tokenizer.txt",
    } <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    promised = (
        "policy_reward reference_reward best_of_8_reward win_rate kl kl_se optimal_reward optimal_reward_se effective_sample_size efficiency "
        "policy_length reference_length"
    ).split()
    assert all(name in metrics and f"ood_{name}" in metrics for name in promised)
    assert not list(folder.glob("*.part"))


def test_a_short_run_improves_the_reward_on_prompts_never_trained_on(tmp_path):
    metrics = train.main(
        small(
            tmp_path / "run",
            reference_steps=200,
            steps=100,
            batch_size=16,
            eval_prompts=20,
            width=64,
        )
    )
    assert metrics["policy_reward"] > metrics["reference_reward"] + 0.15
    assert metrics["win_rate"] > 0.55


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "summary"},
        {"sft_weight": 0.0, "score": "mean", "reward_norm": "list-zscore"},
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


def test_compile_compiles_the_scoring_of_the_policy(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or f)
    train.main(small(tmp_path / "run", compile=True, reference_steps=2, steps=2))
    assert compiled[0].__name__ == "hidden"


def test_a_run_is_drawn_or_says_which_package_would_draw_it(finished, monkeypatch, pictures):
    if importlib.util.find_spec("matplotlib"):
        assert pictures(finished[0]) == f"curves: {finished[0] / 'curves.png'}"
        assert (finished[0] / "curves.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in pictures(finished[0])


def test_policy_equals_reference_before_the_first_step_in_either_precision(finished):
    for dtype in ("float32", "bfloat16"):
        c = train.resolve(small("unused", dtype=dtype))
        world = train.make_world(c)
        model = train.new_model(c, world)
        ratios = train.sampled_kl(c, world, model, model, world.heldout[:3], 4, "test")[1]
        assert torch.equal(ratios, torch.zeros_like(ratios))


# --------------------------------------------------------------------------------------------------- evaluation and the optimum


def test_the_sampled_optimum_agrees_with_enumeration_on_tiny(finished):
    c = train.resolve(small("unused", eval_samples=256, seed=3))
    world = train.make_world(c)
    reference, policy = train.new_model(c, world), train.new_model(c, world)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        for p, q in zip(policy.parameters(), reference.parameters()):
            p.copy_(q + 0.04 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    exact, *_ = train.evaluate_task(
        c, world, policy, reference, world.heldout[:8], "x", enumerated=True
    )
    sampled, *_ = train.evaluate_task(
        c, world, policy, reference, world.heldout[:8], "x", enumerated=False
    )
    assert exact["kl"] > 0.2
    assert sampled["kl"] == pytest.approx(exact["kl"], abs=4 * sampled["kl_se"])
    assert sampled["optimal_reward"] == pytest.approx(exact["optimal_reward"], rel=0.1)
    assert sampled["policy_reward"] <= sampled["optimal_reward"] + 0.1


def test_efficiency_is_one_for_the_optimum_and_null_where_it_means_nothing(finished):
    c = train.resolve(small("unused"))
    world = train.make_world(c)
    model = train.new_model(c, world)
    metrics, *_ = train.evaluate_task(c, world, model, model, world.heldout[:4], "x")
    assert metrics["kl"] == pytest.approx(0, abs=1e-9) and metrics["efficiency"] is None
    responses = train.enumerate_tiny(world)
    example = dataclasses.replace(
        world.heldout[0], response_ids=responses, rewards=[0.0] * len(responses)
    )
    ref = torch.tensor(train.score_examples(c, world, model, [example]), dtype=torch.float64)
    assert ref.logsumexp(-1).item() == pytest.approx(0, abs=1e-6)
    rewards = torch.tensor([train.rewarded(world, example.prompt, responses)], dtype=torch.float64)
    assert frontier.frontier(
        ref, dro.optimal_logps(ref, rewards, 0.4), rewards
    ).efficiency == pytest.approx(1)


def test_list_metrics_count_ties_half_and_name_every_score():
    rows = [
        {
            "prompt": "x",
            "rewards": [3.0, 1.0, 2.0],
            "good": [3, 1, 2],
            "bad": [1, 3, 2],
            "flat": [0, 0, 0],
            "longest": [9, 8, 7],
        }
    ]
    m = train.list_metrics(rows)
    assert (
        m["pair_accuracy_good"],
        m["pair_accuracy_bad"],
        m["pair_accuracy_flat"],
        m["longer_accuracy"],
    ) == (
        1,
        0,
        0.5,
        2 / 3,
    )
    assert (m["top1_reward_good"], m["top1_reward_bad"], m["mean_reward"], m["best_reward"]) == (
        3,
        1,
        2,
        3,
    )


def test_the_probabilities_of_tiny_sum_to_one_for_reference_and_policy(finished):
    folder, _ = finished
    c = train.resolve(small("unused"))
    world = train.make_world(c)
    examples = train.with_responses(world.heldout[:3], [train.enumerate_tiny(world)] * 3)
    for state in (torch.load(folder / "reference.pt", weights_only=True), weights(folder)):
        model = train.new_model(c, world)
        model.load_state_dict(state)
        logps = torch.tensor(train.score_examples(c, world, model, examples)).double()
        assert (logps.exp().sum(-1) - 1).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------- nothing lost


def test_one_seed_gives_one_run_and_another_seed_another(finished):
    folder, _ = finished
    train.main(small(folder.parent / "again"))
    train.main(small(folder.parent / "other", seed=1))
    assert same(weights(folder), weights(folder.parent / "again"))
    assert (folder / "log.jsonl").read_text() == (folder.parent / "again" / "log.jsonl").read_text()
    assert not same(weights(folder), weights(folder.parent / "other"))


@pytest.mark.parametrize("crash", [1, 4, 5, 6, 7, 9, 12])
def test_a_run_cut_anywhere_resumes_to_the_same_bits(finished, monkeypatch, crash):
    """Evolve rounds end at 6 and 12, checkpoints are at 4, 8 and 12; a crash before the first one starts over."""
    folder, _ = finished
    cut, real, calls = folder.parent / f"cut-{crash}", train.compute_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == crash + 1:  # the first call is the trial before the run
            raise OSError("the machine is gone")
        return real(*args)

    monkeypatch.setattr(train, "compute_loss", failing)
    with pytest.raises(OSError):
        train.main(small(cut))
    monkeypatch.setattr(train, "compute_loss", real)
    train.main(train.command_line(["--resume", str(cut)]))
    assert same(weights(folder), weights(cut))
    assert (folder / "log.jsonl").read_text() == (cut / "log.jsonl").read_text()


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
        assert torch.load(tmp_path / how / "checkpoint.pt", weights_only=True)["step"] < 240
        if how == "interrupted":
            assert (
                process.returncode == 1
                and f"python train.py --resume {tmp_path / how}" in said
                and "Traceback" not in said
            )
        train.main(train.command_line(["--resume", str(tmp_path / how)]))
        assert same(weights(tmp_path / "whole"), weights(tmp_path / how))


def test_a_checkpoint_of_another_config_is_refused_with_the_difference(finished, capsys):
    folder, _ = finished
    with pytest.raises(ConfigError, match="lr: 0.001 there, 0.01 here"):
        train.command_line(["--resume", str(folder), "--lr", "0.01"])
    with pytest.raises(ConfigError, match="temperature: 4.0 there, 1.0 here"):
        train.main(small(folder, resume=str(folder), temperature=1.0))
    with pytest.raises(ConfigError, match="holds a run already"):
        train.main(small(folder))
    with pytest.raises(ConfigError, match="no config.json"):
        train.command_line(["--resume", str(folder / "nothing")])


def test_a_non_finite_loss_stops_with_the_last_good_checkpoint_kept(finished, monkeypatch):
    folder = finished[0].parent / "nan"
    real, calls = train.compute_loss, []
    monkeypatch.setattr(
        train,
        "compute_loss",
        lambda *args: calls.append(1) or real(*args) * (math.nan if len(calls) > 6 else 1.0),
    )
    with pytest.raises(
        FloatingPointError, match="step 6: loss is nan.*last good checkpoint"
    ):  # one call was the trial before the run
        train.main(small(folder))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(
        torch.isfinite(p).all() for p in checkpoint["policy"].values()
    )


def test_the_cached_reference_is_used_verified_and_told_apart(tmp_path, capsys):
    train.main(small(tmp_path / "a", steps=2))
    train.main(small(tmp_path / "b", steps=2))
    assert "(cached)" in capsys.readouterr().out
    path = next((tmp_path / "reference").glob("*.pt"))
    whole = path.read_bytes()
    kept = torch.load(path, weights_only=True)
    kept["weights"]["wte.weight"][0, 0] += 1  # a readable file with other weights
    torch.save(kept, path)
    train.main(small(tmp_path / "c", steps=2))
    assert "do not match their digest" in capsys.readouterr().out
    path.write_bytes(whole[: len(whole) // 2])  # half a file
    train.main(small(tmp_path / "d", steps=2))
    assert "is damaged" in capsys.readouterr().out
    assert same(weights(tmp_path / "a"), weights(tmp_path / "d"))
    train.main(small(tmp_path / "e", steps=2, seed=7, reference_steps=41))
    assert "the nearest one differs in seed, texts, --reference-steps" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------- own files

LISTS = [
    {
        "prompt": f"What is {i} like?",
        "responses": ["Fine, thank you.", "Bad.", "So so."][: 2 + i % 2],
        "rewards": [1.0, 0.0, 0.5][: 2 + i % 2],
    }
    for i in range(60)
]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_files_train_and_report_list_metrics_on_held_out_prompts(tmp_path):
    path = write(tmp_path / "lists.jsonl", LISTS)
    metrics = train.main(small(tmp_path / "run", data=[path], evolve=None, vocab_size=300))
    for name in (
        "policy_sum",
        "policy_mean",
        "policy_ratio",
        "reference_sum",
        "reference_mean",
        "longest",
    ):
        assert 0 <= metrics[f"top1_reward_{name}"] <= metrics["best_reward"] <= 1
    assert metrics["pair_accuracy_policy_mean"] > 0.9 and metrics["longer_accuracy"] == 1
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "heldout.jsonl").read_text().splitlines()
    ]
    assert train.list_metrics(rows)["top1_reward_policy_mean"] == metrics["top1_reward_policy_mean"]
    own = train.main(
        small(
            tmp_path / "own",
            data=[path],
            eval_data=[write(tmp_path / "eval.jsonl", LISTS[:5])],
            evolve=None,
            vocab_size=300,
        )
    )
    assert own["best_reward"] == 1.0


@pytest.mark.parametrize(
    "records, message",
    [
        (
            [{"prompt": "x", "responses": ["a"], "rewards": [1, 2]}],
            r"lists.jsonl:1: 1 responses and 2 rewards",
        ),
        (
            [{"prompt": f"{i}", "responses": ["a"], "rewards": [1]} for i in range(40)],
            "every list here has a single response",
        ),
        (
            [{"prompt": "same", "responses": ["a", "b"], "rewards": [1, 2]}] * 5,
            "expected some of both",
        ),
    ],
)
def test_bad_data_ends_the_run_before_anything_is_written(tmp_path, records, message):
    with pytest.raises((data.DataError, ConfigError), match=message):
        train.main(
            small(tmp_path / "run", data=[write(tmp_path / "lists.jsonl", records)], evolve=None)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["lists.jsonl"]


def test_a_constant_reward_is_nothing_to_learn(tmp_path):
    records = [{**r, "rewards": [1.0] * len(r["rewards"])} for r in LISTS]
    with pytest.raises(ConfigError, match="nothing to learn"):
        train.main(
            small(
                tmp_path / "run",
                data=[write(tmp_path / "lists.jsonl", records)],
                evolve=None,
                reward_norm="global",
            )
        )


def test_lire_needs_a_list_with_unlike_rewards(tmp_path):
    records = [{**r, "rewards": [float(i)] * len(r["rewards"])} for i, r in enumerate(LISTS)]
    with pytest.raises(ConfigError, match="nothing to compare"):
        train.main(
            small(tmp_path / "run", data=[write(tmp_path / "lists.jsonl", records)], evolve=None)
        )


def test_damaged_files_of_a_run_end_with_one_line(tmp_path, capsys):
    train.main(small(tmp_path / "run", steps=1, reference_steps=1))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="checkpoint.pt is damaged"):
        train.main(train.command_line(["--resume", str(tmp_path / "run")]))
    for damaged in ("{", "[1]"):
        (tmp_path / "run" / "config.json").write_text(damaged)
        with pytest.raises(ConfigError, match="config.json is damaged"):
            train.command_line(["--resume", str(tmp_path / "run")])
    next((tmp_path / "reference").glob("*.json")).write_text("{")  # it only serves a message
    train.main(small(tmp_path / "other", steps=1, reference_steps=2))


def test_changed_data_are_refused_on_resume(tmp_path):
    path = write(tmp_path / "lists.jsonl", LISTS)
    train.main(small(tmp_path / "run", data=[path], evolve=None, vocab_size=300))
    write(tmp_path / "lists.jsonl", LISTS[:-1])
    with pytest.raises(ConfigError, match="data have changed"):
        train.main(train.command_line(["--resume", str(tmp_path / "run")]))


def test_gpt2_explains_itself_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data.tiktoken,
        "get_encoding",
        lambda name: (_ for _ in ()).throw(ConnectionError("no network")),
    )
    with pytest.raises(data.DataError, match="TIKTOKEN_CACHE_DIR"):
        train.main(small(tmp_path / "run", task="dialogue", tokenizer="gpt2"))


def test_gpt2_vocabulary_runs_where_it_is_at_hand(tmp_path, monkeypatch):
    folder = (
        Path(os.environ.get("LIRE_DATA_DIR", ROOT.parent / "shared" / "data")) / "tiktoken_cache"
    )
    if not folder.exists():
        pytest.skip(f"GPT-2's vocabulary is not in {folder}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    path = write(tmp_path / "lists.jsonl", LISTS)
    metrics = train.main(
        small(
            tmp_path / "run",
            data=[path],
            evolve=None,
            tokenizer="gpt2",
            reference_steps=1,
            steps=1,
            max_response=6,
            width=16,
            eval_data=[write(tmp_path / "held.jsonl", LISTS[:6])],
        )
    )
    assert math.isfinite(metrics["kl"])


# ------------------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--lr -1", "--lr must be positive"),
        ("--lr nan", "--lr must be finite"),
        ("--task chess", "choose from dialogue, summary, tiny"),
        ("--objective lyre", "'lyre' is unknown"),
        ("--candidates 1", "at least 2"),
        ("--width 30", "multiple of --heads"),
        ("--vocab-size 10", "at least 257"),
        ("--data x.jsonl --evolve 1", "no reward function"),
        ("--eval-data x.jsonl", "goes with --data"),
        ("--steps -3", "must not be negative"),
        ("--temperature 0", "must be positive"),
        ("--data nowhere.jsonl", "nowhere.jsonl:1: No such file"),
        ("--device cuda", "sees no CUDA GPU"),
        ("--task tiny --tokenizer gpt2", "fixed vocabulary"),
        ("--reward-norm l2", "choose from softmax"),
        ("--objective dro --tau 0", "--tau must be positive"),
        ("--objective dro --share-networks --value-lr 0.1", "leave it or --share-networks away"),
        ("--behaviour uniform", "which only --task tiny can name"),
        ("--data x.jsonl --task tiny", "give one of the two"),
        ("--model bert", "choose from gpt, t5"),
        ("--objective dro --reward-norm softmax", "takes global or none"),
        ("--objective kto --batch-size 1", "at least 2, got 1"),
        ("--objective dro-p --batch-size 1", "at least 2, got 1"),
        (
            "--objective kto --desirable positive --reward-norm global",
            "leave --reward-norm global away",
        ),
        (
            "--objective lire --tau 0.5",
            "--tau is an option of dro, dro-p: --objective lire does not read it",
        ),
        ("--objective dro --beta 0.5", "--beta is an option of dpo, ipo, pl-dpo, kto"),
        ("--objective pro --pairs all", "--pairs is an option of dpo, ipo, slic"),
        ("--objective dpo --sft-weight 0.1", "--sft-weight is an option of lire, rrhf, slic, pro"),
        ("--objective kto --value batch", "--value is an option of dro:"),
        ("--task tiny --evolve 0 --behaviour uniform", "samples none"),
    ],
)
def test_impossible_values_end_with_one_clear_line(argv, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data, "gpt2_encoding", lambda: data.encoding(data.train_bpe(["x"], 300)))
    with pytest.raises((ConfigError, data.DataError), match=message) as e:
        train.main(train.command_line(argv.split()))
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_unknown_flags_and_errors_of_the_script_are_one_line(tmp_path):
    for argv in (["--learning-rate", "1"], ["--lr", "-1"], ["--lr", "fast"]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *argv],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode != 0 and done.stderr.count("\n") == 1 and argv[0] in done.stderr, (
            done.stderr
        )


def test_every_option_is_read_by_the_code_and_explained():
    source = inspect.getsource(train)
    for f in dataclasses.fields(Config):
        assert re.search(rf"\bc\.{f.name}\b", source) or f.name in train.REFERENCE_SETTINGS, f.name
        assert f.metadata["help"], f.name


def test_importing_any_module_has_no_side_effect(tmp_path):
    code = "import lire, dro, model, data, train; import os; assert not os.listdir('.'), os.listdir('.')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_padding_free_example_of_progress(capsys):
    progress = train.Progress("lire", 10)
    progress.show(5, "loss 1", line=True)
    progress.show(6, "loss 1")
    assert re.fullmatch(r"lire 5/10  loss 1  \d+ s left\n", capsys.readouterr().out)


def loop_state(tmp_path, **settings):
    c = train.resolve(small(tmp_path / "run", **settings))
    world = train.make_world(c)
    model = train.new_model(c, world)
    return c, world, train.new_state(c, world, model), model


def test_shuffled_prompts_are_other_prompts(tmp_path):
    c, world, state, model = loop_state(
        tmp_path, task="dialogue", candidates=2, shuffle_prompts=True, max_prompt=32, max_response=4
    )
    lists = [[[1, 2], [3, 4]] for _ in world.train]
    pool = train.make_pool(c, world, state, model, world.train, lists)
    thing = lambda ids: world.enc.decode(ids).rstrip("?.").split()
    kept = sum(
        bool(set(thing(e.prompt_ids)) & set(tasks.SENTIMENT) & set(e.prompt.rstrip("?.").split()))
        for e in pool
    )
    assert kept < 0.1 * len(pool)


def test_iterate_passes_over_a_smaller_pool_more_often(tmp_path):
    rows = {}
    for iterate in (1, 2):
        train.main(small(tmp_path / f"{iterate}", iterate=iterate, steps=8, evolve=1, batch_size=4))
        generated = torch.load(tmp_path / f"{iterate}" / "checkpoint.pt", weights_only=True)[
            "generated"
        ]
        rows[iterate] = sum(bool(lists) for lists in generated)
    assert rows == {1: 32, 2: 16}


def test_sample_temperature_changes_the_pool_and_clip_and_decay_the_step(tmp_path):
    ends = {}
    for name, settings in {
        "base": {},
        "pool": {"sample_temperature": 3.0},
        "clip": {"clip": 1e-9},
        "decay": {"weight_decay": 5.0},
    }.items():
        train.main(small(tmp_path / name, steps=4, evolve=1, **settings))
        ends[name] = weights(tmp_path / name)
    assert not any(same(ends["base"], ends[name]) for name in ("pool", "clip", "decay"))


def test_a_half_written_log_line_does_not_stop_a_resumed_run(finished, tmp_path):
    folder = finished[0].parent / "half"
    train.main(small(folder))
    with open(folder / "log.jsonl", "a") as f:
        f.write('{"step": 9, "evo')
    train.main(train.command_line(["--resume", str(folder)]))
    assert (folder / "log.jsonl").read_text() == (finished[0] / "log.jsonl").read_text()


def test_lists_of_one_response_train_the_reference_and_are_left_out_of_lire(tmp_path, capsys):
    single = write(
        tmp_path / "single.jsonl",
        [{**r, "responses": r["responses"][:1], "rewards": r["rewards"][:1]} for r in LISTS],
    )
    metrics = train.main(
        small(tmp_path / "sft", objective="sft", data=[single], evolve=None, vocab_size=300)
    )
    assert metrics["kl"] == 0 and "top1_reward_longest" not in metrics
    mixed = write(
        tmp_path / "mixed.jsonl",
        [
            {**r, "responses": r["responses"][: 1 + i % 2], "rewards": r["rewards"][: 1 + i % 2]}
            for i, r in enumerate(LISTS)
        ],
    )
    train.main(small(tmp_path / "lire", data=[mixed], evolve=None, vocab_size=300))
    assert "lists of a single response are left out" in capsys.readouterr().out


def test_no_steps_is_the_reference_itself(tmp_path):
    assert train.main(small(tmp_path / "run", steps=0))["kl"] == 0


def test_held_out_prompts_are_never_trained_on(tmp_path, capsys):
    path = write(tmp_path / "lists.jsonl", LISTS)
    held = write(tmp_path / "held.jsonl", LISTS[:7])
    world = train.make_world(
        train.resolve(
            small(tmp_path / "run", data=[path], eval_data=[held], evolve=None, vocab_size=300)
        )
    )
    assert not {e.prompt for e in world.logged} & {e.prompt for e in world.heldout}
    assert "7 lists with a held-out prompt are left out" in capsys.readouterr().out


def test_ties_of_a_score_give_the_mean_reward_of_the_tied():
    assert train.list_outcome([1.0, 1.0, 0.0], [4.0, 2.0, 9.0]) == (3.0, 0.5, 3)


# ------------------------------------------------------------------------------------------------------------ DRO, KTO, the T5


@pytest.mark.parametrize("objective", ["lire", "dro", "dro-p", "kto", "sft"])
@pytest.mark.parametrize("task", ["summary", "tiny"])
def test_every_objective_and_task_runs_with_the_t5(tmp_path, objective, task):
    settings = {
        "task": task,
        "objective": objective,
        "model": "t5",
        "reference_steps": 2,
        "steps": 2,
    }
    metrics = train.main(
        small(tmp_path / "run", **settings, candidates=2, eval_prompts=2, eval_samples=8)
    )
    assert math.isfinite(metrics["policy_reward"]) and math.isfinite(metrics["kl"])


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "dro"},
        {"objective": "dro", "share_networks": True},
        {"objective": "dro", "value": "batch", "value_lr": 1e-3, "optimizer": "adafactor"},
        {"objective": "dro", "candidates": 1, "model": "t5"},
        {"objective": "dro", "evolve": 0},
        {"objective": "dro", "behaviour": "uniform", "dtype": "bfloat16", "model": "t5"},
        {"objective": "dro-p", "behaviour": "reference", "evolve": 2},
        {"objective": "kto", "beta": 1.0},
        {"objective": "kto", "desirable": "positive"},
    ],
    ids=str,
)
def test_every_setting_of_dro_and_kto_runs(tmp_path, settings, pictures):
    metrics = train.main(
        small(tmp_path / "run", **{"reference_steps": 5, "steps": 4, "evolve": None, **settings})
    )
    assert math.isfinite(metrics["policy_reward"]) and math.isfinite(metrics["kl"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    promised = {"rewards/implied", "rewards/correlation", "kl", "grad_norm"}
    if settings["objective"] == "dro":
        promised |= {
            "loss/policy",
            "loss/value",
            "value/mean",
            "value/explained_variance",
            "residual/rms",
        }
        assert metrics["value_error"] >= 0 and metrics["kl_from_optimum"] >= 0
    if settings["objective"] != "kto":
        promised |= {"residual/within_prompt"}
    assert promised <= set(rows[-1])
    if importlib.util.find_spec("matplotlib") and len(settings) < 3:
        assert (
            "curves.png" in pictures(tmp_path / "run")
            and (tmp_path / "run" / "curves.png").exists()
        )


def test_dro_improves_the_reward_and_learns_the_value(tmp_path):
    settings = {
        "reference_steps": 60,
        "steps": 200,
        "batch_size": 16,
        "eval_prompts": 20,
        "width": 64,
        "lr": 2e-3,
    }
    metrics = train.main(small(tmp_path / "run", objective="dro", evolve=1, **settings, tau=0.5))
    assert metrics["policy_reward"] > metrics["reference_reward"] + 0.3
    assert metrics["train_kl_from_optimum"] < 0.5 * metrics["train_optimum_kl"]


@pytest.mark.parametrize(
    "own",
    [{"objective": "dro"}, {"objective": "dro", "share_networks": True}, {"objective": "kto"}],
    ids=str,
)
def test_dro_and_kto_resume_to_the_same_bits(tmp_path, monkeypatch, own):
    settings = {**own, "steps": 8, "reference_steps": 5}
    train.main(small(tmp_path / "whole", **settings))
    real, calls = train.compute_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 7:
            raise OSError("the machine is gone")
        return real(*args)

    monkeypatch.setattr(train, "compute_loss", failing)
    with pytest.raises(OSError):
        train.main(small(tmp_path / "cut", **settings))
    monkeypatch.setattr(train, "compute_loss", real)
    train.main(train.command_line(["--resume", str(tmp_path / "cut"), "--device", "auto"]))
    a, b = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert same(a["policy"], b["policy"])
    if own["objective"] == "dro":
        assert (
            same(a["value"], b["value"])
            and a["statistics"] == b["statistics"]
            and a["statistics"][1] > 0
        )


def test_networks_are_apart_unless_shared_and_each_is_clipped_by_itself(tmp_path):
    c, world, state, reference = loop_state(
        tmp_path, objective="dro", evolve=1, lr=5e-4, value_lr=1e-2
    )
    policy, value = ({id(p) for p in group["params"]} for group in state.optimizer.param_groups)
    assert not policy & value and policy == {id(p) for p in state.policy.parameters()}
    assert [group["peak"] for group in state.optimizer.param_groups] == [5e-4, 1e-2]
    assert same(state.value.backbone.state_dict(), reference.state_dict())
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in "ab")
    optimizer = torch.optim.SGD([{"params": [p], "peak": 1.0} for p in (a, b)])
    norms = train.optimizer_step(optimizer, (30 * a + 0.5 * b).sum(), 1, 2, 1.0)
    assert norms == [30.0, 0.5] and b.item() == pytest.approx(-0.5 * train.lr_at(1, 2, 1.0))
    assert a.item() == pytest.approx(-1.0 * train.lr_at(1, 2, 1.0), rel=1e-4)
    c, world, state, reference = loop_state(
        tmp_path, objective="dro", evolve=1, share_networks=True
    )
    assert state.value.backbone is state.policy and len(state.optimizer.param_groups) == 1
    assert any(
        p is state.value.value_head.weight for p in state.optimizer.param_groups[0]["params"]
    )


def test_rewards_that_are_all_alike_are_measured_without_a_nan(tmp_path):
    """A reference that has learnt nothing earns nothing in dialogue: LIRE's run still ends, those of DRO and KTO say why they can't begin."""
    settings = {
        "task": "dialogue",
        "reference_steps": 1,
        "steps": 1,
        "evolve": 1,
        "eval_prompts": 2,
        "candidates": 2,
    }
    metrics = train.main(small(tmp_path / "lire", **settings))
    assert metrics["value_deviation"] == 0 and metrics["efficiency"] is None
    for objective in ("dro", "dro-p", "kto"):
        with pytest.raises(ConfigError, match="every reward is 0.0: there is nothing to learn"):
            train.main(small(tmp_path / objective, objective=objective, **settings))


def test_one_value_for_the_batch_is_the_mean_of_those_of_its_prompts(tmp_path):
    c, world, state, _ = loop_state(tmp_path, objective="dro", evolve=1)
    batch = data.make_batch(train.with_responses(world.train[:3], [[[0]]] * 3), 0)
    with torch.no_grad():
        state.value.value_head.weight.normal_()
        apart = train.batch_values(c, state, batch)
        together = train.batch_values(dataclasses.replace(c, value="batch"), state, batch)
    assert apart.std() > 0 and torch.allclose(together, apart.mean().expand(3))


def test_the_loss_of_dro_counts_every_response_once_with_its_prompts_value():
    c = train.resolve(Config(objective="dro", tau=0.5, device="cpu"))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards, logps, ref = (
        torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    ids = torch.ones(2, 3, 4, dtype=torch.long)
    batch = data.Batch(
        ids[:, 0], ids[:, 0].bool(), ids, mask[..., None].expand(2, 3, 4), mask, rewards, ref
    )
    logps = torch.where(mask, logps, torch.nan)  # an empty slot may hold anything
    losses = train.compute_loss(c, logps, batch, torch.tensor([0.3, -0.7]))
    expected = [
        dro.dro_v_losses(
            *(x[None] for x in (logps[i, j], ref[i, j], rewards[i, j], torch.tensor(v))), 0.5
        )
        for i, j, v in ((0, 0, 0.3), (0, 1, 0.3), (0, 2, 0.3), (1, 0, -0.7))
    ]
    for k, name in enumerate(("loss/policy", "loss/value")):
        torch.testing.assert_close(losses[name], torch.cat([e[k] for e in expected]))
    assert train.total(losses).item() == pytest.approx(
        sum(x.mean().item() for x in losses.values())
    )


def test_mismatched_pairs_are_the_next_prompts_first_candidate_without_gradient(tmp_path):
    c, world, state, reference = loop_state(tmp_path, objective="kto", evolve=1)
    with torch.no_grad():
        state.policy.wpe.weight.add_(0.3)
    words = train.enumerate_tiny(world)
    examples = train.with_responses(
        world.train[:3], [[words[0], words[80]], [words[20]], [words[100], words[5]]]
    )
    batch = data.make_batch(examples, world.enc.eot_token)
    policy, ref = train.mismatched_logps(world, state.policy, reference, batch)
    apart = train.with_responses(world.train[:3], [[words[20]], [words[100]], [words[0]]])
    for found, model in ((policy, state.policy), (ref, reference)):
        expected = [row[0] for row in train.score_examples(c, world, model, apart)]
        assert found.tolist() == pytest.approx(expected, abs=1e-5) and not found.requires_grad
    alone = data.make_batch(examples[:1], world.enc.eot_token)
    assert [len(x) for x in train.mismatched_logps(world, state.policy, reference, alone)] == [0, 0]
    twice = data.make_batch(
        [examples[0], examples[0], examples[1]], world.enc.eot_token
    )  # one pair has the same prompt twice
    assert [len(x) for x in train.mismatched_logps(world, state.policy, reference, twice)] == [2, 2]


def test_the_residual_within_prompts_is_that_of_the_samples(tmp_path):
    c, world, state, reference = loop_state(tmp_path, objective="dro", evolve=1, tau=0.5)
    state.statistics = [0.2, 0.8]
    m = train.quick_evaluation(
        c, world, state, reference, 1
    )  # policy = reference: what is left is the reward's deviation
    lists = train.sample_lists(
        c, world, reference, world.heldout[:32], 8, train.rng(c.seed, "quick", 1)
    )
    rewards = torch.tensor(
        [train.rewarded(world, e.prompt, ys) for e, ys in zip(world.heldout, lists)]
    )
    expected = (rewards / 0.8).var(-1, correction=0).mean().sqrt().item()
    assert m["residual/within_prompt"] == pytest.approx(expected, rel=1e-5)


SINGLES = [
    {"prompt": f"What is {i} like?", "response": "Fine." if i % 2 else "Bad.", "reward": i % 2}
    for i in range(60)
]
THUMBS = [
    {"prompt": r["prompt"], "completion": r["response"], "label": bool(r["reward"])}
    for r in SINGLES
]


@pytest.mark.parametrize("objective", ["dro", "dro-p", "kto"])
@pytest.mark.parametrize("rows", [SINGLES, THUMBS, LISTS], ids=["singles", "thumbs", "lists"])
def test_single_responses_thumbs_and_lists_train_dro_and_kto(tmp_path, objective, rows):
    path = write(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    train.main(
        small(
            run,
            data=[path],
            objective=objective,
            evolve=None,
            vocab_size=300,
            reference_steps=2,
            steps=4,
        )
    )
    expected = ("positive" if rows is THUMBS else "mean") if objective == "kto" else None
    assert json.loads((run / "config.json").read_text())["desirable"] == expected
    row = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(row["loss"]) and "rewards/correlation" in row


def test_candidates_takes_the_first_of_a_files_lists(tmp_path, capsys):
    path = write(
        tmp_path / "lists.jsonl",
        [{**r, "rewards": [i % 3, 9, 9][: len(r["rewards"])]} for i, r in enumerate(LISTS)],
    )
    train.main(
        small(
            tmp_path / "run",
            data=[path],
            objective="dro",
            candidates=1,
            evolve=None,
            vocab_size=300,
        )
    )
    assert "lists of 1.0 responses" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        (SINGLES, {}, "every list here has a single response.*dro and kto can"),
        (
            [{**r, "reward": 2.0} for r in SINGLES],
            {"objective": "dro"},
            "every reward is 2.0: there is nothing to learn",
        ),
        (
            [{**r, "label": True} for r in THUMBS],
            {"objective": "kto"},
            "none of these .. is undesirable",
        ),
        (
            [{**r, "label": False} for r in THUMBS],
            {"objective": "kto"},
            "none of these .. is desirable",
        ),
        (
            [{**r, "label": "up"} for r in THUMBS],
            {"objective": "kto"},
            "'label' is 'up', expected true or false",
        ),
        (SINGLES, {"objective": "dro", "tau": 0.0}, "--tau must be positive"),
        (SINGLES, {"objective": "kto", "beta": -1.0}, "--beta must be positive"),
    ],
)
def test_data_that_teach_dro_or_kto_nothing_end_with_one_line(tmp_path, rows, settings, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises((ConfigError, data.DataError), match=message) as e:
        train.main(small(tmp_path / "run", data=[path], evolve=None, vocab_size=300, **settings))
    assert "\n" not in str(e.value) and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
