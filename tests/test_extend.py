"""What a reader adds, an objective, a task or a format, is one function and one row of a table."""

import dataclasses
import math

import pytest
import torch
from helpers import LISTS, log, small, write

import files
import tasks
import train
from experiments import compare
from formats import FORMATS, Format
from harness import command_line as command_line_module
from harness import config
from harness.command_line import command_line
from harness.config import Config, ConfigError, option, resolve
from objectives import OBJECTIVES, Objective
from records import get, one_list
from tasks import TASKS, Task, TaskRow

# ------------------------------------------------------------------------------------- an objective


def hinge_objective(c, x):
    """The best candidate `lead` nats above the mean of its list."""
    best = x.rewards.masked_fill(~x.mask, -torch.inf).argmax(-1, keepdim=True)  # [B, 1]
    mean = torch.where(x.mask, x.logps, 0.0).sum(-1) / x.mask.sum(-1)
    return {"loss": (c.lead - x.logps.gather(-1, best)[:, 0] + mean).clamp_min(0.0)}


HINGE = Objective(hinge_objective, {"lr": 1e-3, "lead": 2.0}, {"lists"}, strength="lead")


@pytest.fixture
def hinge(monkeypatch):
    """One function, one row of OBJECTIVES, one field of Config."""
    text = "what the best candidate should be ahead by, in nats"
    field = ("lead", float | None, option(None, text, positive=True))
    own = dataclasses.make_dataclass("Config", [field], bases=(Config,))
    monkeypatch.setattr(config, "Config", own)
    monkeypatch.setattr(command_line_module, "Config", own)
    monkeypatch.setitem(OBJECTIVES, "ahead", HINGE)


def help_text(capsys):
    with pytest.raises(SystemExit):
        command_line(["--help"])
    return " ".join(capsys.readouterr().out.split())


def test_a_new_objective_is_in_the_help_with_its_option_and_its_default(hinge, capsys):
    text = help_text(capsys)
    assert "slic, pro, rwr, sft" in text and ", ahead (default lire)" in text
    assert (
        "--lead LEAD what the best candidate should be ahead by, in nats (default 2.0 ahead)"
        in text
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--objective lyre", "choose from .*lire, .*, sft.*, ahead"),
        ("--lead 1", "--lead is an option of ahead: --objective lire does not read it"),
        ("--objective ahead --lead 0", "--lead must be positive"),
        (
            "--objective ahead --tau 1",
            "--tau is an option of dro, dro-p, rwr: --objective ahead does",
        ),
        ("--objective ahead --candidates 1", "ahead compares the candidates of a list"),
        ("--objective ahead --reward-norm softmax", "ahead takes none or global"),
    ],
)
def test_a_new_objective_is_in_the_refusals(hinge, argv, message):
    with pytest.raises(ConfigError, match=message):
        resolve(command_line(argv.split()))


def test_a_new_objective_shows_its_own_settings_and_is_compared(hinge):
    shown = config.settings_read(resolve(command_line(["--objective", "ahead"])))
    assert shown["lead"] == 2.0 and not {"temperature", "tau", "beta"} & set(shown)
    assert "lead" not in config.settings_read(resolve(command_line([])))
    row = {"objective": "ahead", "lead": 2.0}
    for quick in (True, False):
        assert compare.compare_rows(quick)["ahead, lead 2"] == row


@pytest.mark.parametrize("data", [False, True])
def test_a_new_objective_runs(hinge, tmp_path, data):
    own = {"data": [write(tmp_path, *LISTS)]} if data else {}
    settings = vars(small(tmp_path / "run", objective="ahead", steps=2, reference_steps=2, **own))
    metrics = train.main(config.Config(**settings, lead=3.0))
    assert math.isfinite(metrics["kl"])
    row = log(tmp_path / "run")[-1]
    assert math.isfinite(row["loss"]) and row["rewards/margins"] is not None
    again = command_line(["--resume", str(tmp_path / "run")])
    assert again.lead == 3.0


def test_a_slip_in_a_new_objective_shows_before_anything_is_written(hinge, tmp_path, monkeypatch):
    slip = HINGE._replace(loss=lambda c, x: {"loss": x.logps - x.logs})
    monkeypatch.setitem(OBJECTIVES, "ahead", slip)
    with pytest.raises(config.ConfigError, match=r"test_extend.py:\d+: AttributeError: .*logs"):
        train.main(config.Config(**vars(small(tmp_path / "run", objective="ahead"))))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- a task


def weather():
    """Is it a day for a coat? One word of three answers; 1 for the right one."""
    right = {"rain": "yes", "sun": "no", "snow": "yes", "wind": "maybe", "fog": "maybe"}
    words = ["yes", "no", "maybe"]

    def reward(prompt, response):
        return float(response.strip() == right[prompt.split()[0]])

    ask = {"train": "{} today", "heldout": "{} tomorrow"}
    known = {k: [text.format(day) for day in right if day != "fog"] for k, text in ask.items()}
    return Task(
        "weather",
        **known,
        ood=["fog today"],
        answers=lambda prompt, rng: [rng.choice(words) for _ in range(4)],
        reward=reward,
        max_response=2,
        words=words,
        vocabulary=[*right, " today", " tomorrow", *(f" {word}" for word in words)],
    )


@pytest.fixture
def new_task(monkeypatch):
    monkeypatch.setitem(TASKS, "weather", TaskRow(weather, {"reference_lr": 1e-2}))


def test_a_new_task_is_in_the_help_and_in_the_refusals(new_task, capsys):
    text = help_text(capsys)
    assert "synthetic world: dialogue, summary, tiny, weather" in text and "0.01 weather" in text
    with pytest.raises(ConfigError, match="choose from dialogue, summary, tiny, weather"):
        resolve(Config(task="chess"))
    with pytest.raises(ValueError, match="tiny, weather"):
        tasks.make_task("chess")
    assert resolve(Config(task="weather")).reference_lr == 1e-2


@pytest.mark.parametrize("objective", ["lire", "dro"])
def test_a_new_task_runs_and_is_measured_against_its_optimum(new_task, tmp_path, objective):
    own = {"task": "weather", "objective": objective, "candidates": 4, "reference_steps": 2}
    metrics = train.main(small(tmp_path / "run", **own, steps=2))
    assert 0 <= metrics["policy_reward"] <= metrics["optimal_reward"] + 1
    assert math.isfinite(metrics["kl"]) and math.isfinite(metrics["ood_policy_reward"])
    assert metrics["optimal_reward"] <= 1 and metrics["policy_length"] == 2  # a word and EOS


# ----------------------------------------------------------------------------------------- a format


def read_pair(row):
    """{"query", "good", "bad"}: the good response earns 1, the bad one 0."""
    return one_list(get(row, "query", str), [get(row, "good"), get(row, "bad")], [1.0, 0.0])


@pytest.fixture
def pairs(monkeypatch):
    """One function and one row."""
    own = Format(read_pair, "query good bad", "good and bad responses", "M = 2: 1 and 0")
    monkeypatch.setitem(FORMATS, "pairs", own)


PAIRS = [
    {"query": row["prompt"], "good": row["responses"][0], "bad": row["responses"][1]}
    for row in LISTS
]


def test_a_new_format_is_recognised_and_the_others_still_are(pairs, tmp_path):
    news = []
    records = files.load([write(tmp_path, *PAIRS)], say=news.append)
    assert records[0] == {
        "prompt": "What is 0 like?",
        "responses": ["Fine, thank you.", "Bad."],
        "rewards": [1.0, 0.0],
    }
    assert len(records) == 60 and "good and bad responses, 60 prompts" in news[0]
    assert files.load([write(tmp_path, *LISTS)], say=news.append) == LISTS
    assert "canonical" in news[1]


def test_a_bad_line_of_a_new_format_is_named_with_its_number(pairs, tmp_path):
    path = write(tmp_path, PAIRS[0], "{")
    with pytest.raises(files.DataError, match=r"lists.jsonl:2: not JSON"):
        files.load([path])
    path = write(tmp_path, PAIRS[0], {"query": "x", "good": "y"})
    with pytest.raises(files.DataError, match=r"lists.jsonl:2: no field 'bad', expected query, "):
        files.load([path])


def test_a_new_format_can_be_asked_for_and_is_the_nearest_where_a_field_is_wrong(pairs, tmp_path):
    path = write(tmp_path, *PAIRS)
    assert len(files.load([path], say=lambda line: None, format="pairs")) == 60
    with pytest.raises(files.DataError, match="nearest is pairs"):
        files.load([write(tmp_path, {"query": "x", "good": "y", "baad": "z"})])


@pytest.mark.parametrize("objective", ["lire", "dro"])
def test_a_run_reads_a_new_format(pairs, tmp_path, objective):
    own = {"data": [write(tmp_path, *PAIRS)], "objective": objective}
    metrics = train.main(small(tmp_path / "run", **own, steps=2, reference_steps=2))
    assert metrics["best_reward"] == 1.0 and metrics["mean_reward"] == 0.5
    assert math.isfinite(metrics["kl"])
