"""Options: what is refused and how, what a run is given and reads, what --help says of it."""

import ast
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers import LISTS, ROOT, flags, small, sources, write

import data
import train
from harness import config, run
from harness.command_line import command_line
from harness.config import Config, ConfigError, resolve, settings_read
from harness.reference import SETTINGS
from objectives import OBJECTIVES
from tasks import TASKS

# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--lr -1", "--lr must be positive"),
        ("--lr nan", "--lr must be finite"),
        ("--task chess", "'chess': choose from dialogue, summary, tiny"),
        ("--objective lyre", "'lyre': choose from lire, dro, dro-p, dpo"),
        ("--candidates 1", "at least 2"),
        ("--width 30", "multiple of --heads"),
        ("--vocab-size 10", "at least 257"),
        ("--data x.jsonl --evolve 1", "no reward function"),
        ("--steps 3 --evolve 4", "--evolve 4: every round needs an update, and --steps is 3"),
        ("--eval-data x.jsonl", "--eval-data goes with --data"),
        ("--format pro", "--format goes with --data"),
        ("--threshold 0", "--threshold goes with --data"),
        (
            "--data x.jsonl --format helpster",
            "--format helpster: no format of this name, nearest are",
        ),
        ("--data x.jsonl --format pro:votes", "--format pro:votes: a field of the rewards can be"),
        ("--desirable-weight 2", "--desirable-weight is an option of kto: --objective lire does"),
        ("--steps -3", "must not be negative"),
        ("--temperature 0", "must be positive"),
        ("--data nowhere.jsonl", "nowhere.jsonl:1: No such file"),
        ("--device cuda", "sees no CUDA GPU"),
        ("--task tiny --tokenizer gpt2", "fixed vocabulary"),
        ("--task tiny --max-response 3", "--task tiny needs --max-response 4, got 3"),
        ("--reward-norm l2", "choose from softmax, zscore, global, none"),
        ("--objective dro --tau 0", "--tau must be positive"),
        ("--objective kto --beta -1", "--beta must be positive"),
        ("--objective dro --share-networks --value-lr 0.1", "leave it or --share-networks away"),
        ("--data x.jsonl --task tiny", "give one of the two"),
        ("--model bert", "choose from gpt, t5"),
        ("--objective dro --reward-norm softmax", "takes global or none"),
        ("--objective dpo --reward-norm softmax", "takes none or global"),
        ("--objective kto --batch-size 1", "at least 2, got 1"),
        ("--objective dro-p --batch-size 1", "at least 2, got 1"),
        ("--grad-accum 17", "a batch has --batch-size 16 prompts, and so no more parts than that"),
        ("--grad-accum 0", "--grad-accum must be positive"),
        (
            "--objective kto --desirable positive --reward-norm global",
            "leave --reward-norm global away",
        ),
        (
            "--objective lire --tau 0.5",
            "--tau is an option of dro, dro-p, rwr: --objective lire does not read it",
        ),
        ("--objective dro --beta 0.5", "--beta is an option of dpo, ipo, pl-dpo, kto: "),
        ("--objective dpo --sft-weight 0.1", "--sft-weight is an option of lire, rrhf, slic, pro:"),
        ("--objective kto --value batch", "--value is an option of dro:"),
        ("--objective sft --temperature 2", "--temperature is an option of lire:"),
    ],
)
def test_impossible_values_end_with_one_clear_line(argv, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data, "gpt2_encoding", lambda: data.encoding(data.train_bpe(["x"], 300)))
    with pytest.raises((ConfigError, data.DataError), match=message) as error:
        train.main(command_line(argv.split()))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_unknown_flags_and_errors_of_the_script_are_one_line(tmp_path):
    for argv in (["--learning-rate", "1"], ["--lr", "-1"]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *argv],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
        assert argv[0] in done.stderr
    with pytest.raises(SystemExit, match=r"^train.py: argument --lr: invalid .*'fast'; --help.*$"):
        command_line(["--lr", "fast"])


def refusal(script):
    """The line that ends a script."""
    with pytest.raises(SystemExit) as end:
        run.run_script("train.py", script)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    assert len(end.value.code) <= 300
    return end.value.code


NUMBERS = [f for f in dataclasses.fields(Config) if config.kind_of(f) in (int, float)]


@pytest.mark.parametrize("name", [f.name for f in NUMBERS])
@pytest.mark.parametrize(
    "value",
    ["18446744073709551616", "1e300", "1e-300", "1e13", "-1", "nan", "inf", "--", "1" * 400],
)
def test_no_number_ends_in_a_traceback(name, value):
    (objective, *_) = config.owners(name) or ["lire"]
    for argv in ([f"{config.flag(name)}={value}"], [config.flag(name), value]):
        argv = ["--objective", objective, *argv]
        said = refusal(lambda argv=argv: resolve(command_line(argv)))
        assert config.flag(name) in said or value == "--"
    with pytest.raises(ConfigError, match=config.flag(name)):
        resolve(Config(objective=objective, **{name: -1}))
    if value != "--" and ("1e" not in value or name != "seed"):
        number = float(value) if not value.isdecimal() else int(value)
        with pytest.raises(ConfigError, match=config.flag(name)):
            resolve(Config(objective=objective, **{name: number}))


@pytest.mark.parametrize("option", dataclasses.fields(Config), ids=lambda option: option.name)
def test_two_dashes_are_no_value_of_any_option(option, finished):
    for more in ([], ["--resume", str(finished[0])]):
        given = [*more, f"{config.flag(option.name)}=--"]
        if config.kind_of(option) is not list:  # no files are none
            refusal(lambda given=given: resolve(command_line(given)))


def test_a_refusal_is_one_short_line_whatever_it_is_made_of():
    message = str(ConfigError(f"--out {'x' * 10_000}\n{'y' * 10_000} is a file"))
    assert message.startswith("--out xxx") and message.endswith("yyy is a file")
    assert len(message) == 300 and "\n" not in message


def test_the_largest_numbers_are_taken_and_a_model_that_no_memory_holds_is_not():
    assert resolve(Config(seed=2**63 - 1)).seed == 2**63 - 1
    assert resolve(Config(lr=1e-9, clip=1e9, steps=10**9)).clip == 1e9
    for own in ({"max_prompt": 10**8}, {"vocab_size": 10**8}, {"layers": 10**5}, {"width": 2**16}):
        with pytest.raises(ConfigError, match="weights, expected at most 2e.09"):
            resolve(Config(**own))
    # 12 weights a layer and square of the width, and one a position or token and width.
    fits = {"layers": 1, "heads": 1, "width": 10, "vocab_size": 257, "max_response": 1}
    assert resolve(Config(**fits, max_prompt=2 * 10**8 - 12 * 10 - 258))
    with pytest.raises(ConfigError, match="weights"):
        resolve(Config(**fits, max_prompt=2 * 10**8 - 12 * 10 - 257))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)])
def test_no_refusal_repeats_a_long_value(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = "x" * 500_000
    wrong = [long] if config.kind_of(Config.__dataclass_fields__[name]) is list else long
    own = {"data": ["x.jsonl"]} if name == "eval_data" else {}
    refusal(lambda: train.main(Config(**own, **{name: wrong})))
    refusal(lambda: train.main(command_line([f"{config.flag(name)}={long}"])))
    refusal(lambda: train.main(command_line([f"--{long}", long])))
    (tmp_path / "config.json").write_text(json.dumps({name: long, long: long}))
    refusal(lambda: command_line(["--resume", "."]))
    (tmp_path / "config.json").write_text(json.dumps({name: wrong}))
    given = ["--resume", ".", f"{config.flag(name)}={'y' * 500_000}"]
    refusal(lambda: train.main(command_line(given)))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["dpo", "rrhf"])
def test_baselines_that_compare_refuse_single_responses_and_norms_of_lists(name):
    with pytest.raises(ConfigError, match="candidates must be at least 2"):
        resolve(Config(objective=name, candidates=1))
    with pytest.raises(ConfigError, match=r"takes (none or global|global or none)"):
        resolve(Config(objective=name, reward_norm="softmax"))


def test_every_option_of_other_objectives_is_refused_and_its_own_are_filled_in():
    own = {name for row in OBJECTIVES.values() for name in row.defaults} - {"lr"}
    values = {"score": "sum", "value": "prompt", "desirable": "mean", "share_networks": False}
    for objective, row in OBJECTIVES.items():
        c = resolve(Config(objective=objective, device="cpu", out="x"))
        assert {name: getattr(c, name) for name in row.defaults} == row.defaults
        for name in own - set(row.defaults):
            assert getattr(c, name) is None
            with pytest.raises(ConfigError, match=f"--objective {objective} does not read it"):
                resolve(Config(objective=objective, **{name: values.get(name, 1.0)}))


def test_defaults_are_those_of_the_objective_the_data_and_the_task_and_giving_one_wins():
    assert resolve(Config(task="summary")).reference_lr == TASKS["summary"].defaults["reference_lr"]
    assert resolve(Config(task="dialogue")).reference_lr == config.ON_TASKS["reference_lr"]
    c = resolve(Config(data=["x.jsonl"]))
    assert (c.evolve, c.vocab_size, c.candidates) == (0, 1024, None)
    assert resolve(Config()).evolve == OBJECTIVES["lire"].evolve == 10
    assert {row.evolve for name, row in OBJECTIVES.items() if name != "lire"} == {1}  # offline
    c = resolve(Config(task="summary", reference_lr=1e-5, evolve=1, lr=0.5))
    assert (c.reference_lr, c.evolve, c.lr) == (1e-5, 1, 0.5)


def test_resolve_leaves_the_config_that_it_is_given_as_it_was():
    given = Config(objective="dro", device="cpu")
    before = dataclasses.asdict(given)
    c = resolve(given)
    assert dataclasses.asdict(given) == before and c.tau == OBJECTIVES["dro"].defaults["tau"]
    assert resolve(c) == c


def test_a_new_run_finds_a_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(Config(seed=3)).out == "out/lire-dialogue-3"
    for taken, free in (("", "-2"), ("-2", "-3")):
        (tmp_path / f"out/lire-lists-0{taken}").mkdir(parents=True)
        (tmp_path / f"out/lire-lists-0{taken}/config.json").write_text("{}")
        assert resolve(Config(data=["there/lists.jsonl.gz"])).out == f"out/lire-lists-0{free}"


# -------------------------------------------------------------------------- what the rewards decide


def test_thumbs_say_themselves_what_is_desirable_and_other_rewards_do_not():
    c = resolve(Config(objective="kto", data=["x.jsonl"], out="x"))
    decided = config.with_settings_of_the_data(c, [1.0, -1.0, 1.0])
    assert (c.desirable, decided.desirable) == (None, "positive")
    assert config.with_settings_of_the_data(c, [1.0, -1.0, 0.5]).desirable == "mean"
    for other in (dataclasses.replace(c, desirable="mean"), dataclasses.replace(c, data=[])):
        # Asked for, or a task, which has no thumbs.
        assert config.with_settings_of_the_data(other, [1.0, -1.0]).desirable == "mean"


@pytest.mark.parametrize(
    "objective, rewards, message",
    [
        ("kto", [1.0, 1.0], "none of these 2 is undesirable"),
        ("kto", [-1.0, -1.0, -1.0], "none of these 3 is desirable"),
        ("kto", [2.0, 2.0], "every reward is 2.0: there is nothing to learn"),
        ("dro", [2.0, 2.0], "every reward is 2.0: there is nothing to learn"),
        ("lire", [2.0, 2.0], "every reward is 2.0: there is nothing to learn"),
    ],
)
def test_rewards_that_teach_nothing_are_refused(objective, rewards, message):
    with pytest.raises(ConfigError, match=message):
        config.with_settings_of_the_data(resolve(Config(objective, data=["x.jsonl"])), rewards)
    assert config.with_settings_of_the_data(resolve(Config(objective="sft")), rewards)


# --------------------------------------------------------------------------------- what a run reads


def test_there_are_at_most_49_options_each_explained():
    fields = dataclasses.fields(Config)
    shared = [f.name for f in fields if not config.owners(f.name)]
    assert len(shared) <= 39  # and 10 that some objectives alone read; a new one may bring its own
    assert [f.name for f in fields if not f.metadata["text"].strip()] == []


def test_every_option_is_read_by_the_code():
    reads = set(SETTINGS)
    for path in sources().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                reads |= {node.attr} if node.value.id == "c" else set()
    assert [f.name for f in dataclasses.fields(Config) if f.name not in reads] == []


OWN = {name for row in OBJECTIVES.values() for name in row.defaults} - {"lr"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_the_options_of_the_objective_are_shown(objective):
    row = OBJECTIVES[objective]
    shown = settings_read(resolve(Config(objective=objective, out="x")))
    assert OWN & set(shown) == {k for k, v in row.defaults.items() if v is not None} - {"lr"}


def test_what_a_run_does_not_read_is_not_shown():
    lire = settings_read(resolve(Config(out="x")))
    assert {"temperature", "task", "sample_temperature", "steps", "candidates"} <= set(lire)
    assert not {"tau", "beta", "value", "data", "eval_data", "limit", "resume"} & set(lire)
    dro = settings_read(resolve(Config(objective="dro", evolve=0, out="x")))
    assert "tau" in dro and not {"sample_temperature", "temperature", "beta"} & set(dro)
    files = settings_read(resolve(Config(data=["x.jsonl"], out="x")))
    assert {"data", "limit", "eval_prompts"} <= set(files)
    assert not {"task", "eval_samples", "sample_temperature"} & set(files)
    gpt2 = settings_read(resolve(Config(tokenizer="gpt2", out="x")))
    assert "vocab_size" in lire and "vocab_size" not in gpt2
    sft = settings_read(resolve(Config(objective="sft", out="x")))
    assert {"reference_steps", "reference_lr", "reference_batch", "eval_samples"} <= set(sft)
    assert not {"steps", "lr", "evolve", "clip", "reward_norm", "eval_every", "grad_accum"} & set(
        sft
    )


@dataclasses.dataclass
class Watched(Config):
    """A Config that notes which of its options are read."""

    noting = False
    reads = set()

    def __getattribute__(self, name):
        if Watched.noting:
            Watched.reads.add(name)
        return super().__getattribute__(name)


def unnoted(function):
    """The function, with nothing noted that it reads (it looks at every option)."""

    def wrapped(*args):
        before, Watched.noting = Watched.noting, False
        result = function(*args)
        Watched.noting = before
        return result

    return wrapped


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "dro"},
        {"objective": "kto", "evolve": 0},
        {"objective": "lire", "evolve": 0},
        {"objective": "dpo", "data": True},
        {"objective": "sft"},
    ],
    ids=str,
)
def test_every_setting_that_is_shown_is_read(settings, tmp_path, monkeypatch):
    if settings.get("data"):
        settings = {**settings, "data": [write(tmp_path, *LISTS)]}
    shown = {}
    for name in ("resolve", "with_settings_of_the_data"):
        monkeypatch.setattr(train, name, unnoted(getattr(train, name)))
    note = unnoted(lambda c: shown.update(settings_read(c)))
    monkeypatch.setattr(train, "describe_settings", note)
    monkeypatch.setattr(Watched, "reads", set())
    given = small(tmp_path / "run", **{"reference_steps": 1, "steps": 2, **settings})
    c = Watched(**vars(given))
    monkeypatch.setattr(Watched, "noting", True)
    train.main(c)
    monkeypatch.setattr(Watched, "noting", False)
    assert "seed" in shown and set(shown) - Watched.reads == set()


def test_settings_stand_in_columns_from_top_to_bottom_with_their_digits():
    c = resolve(small("unused", lr=5e-4))
    rows = [line.split() for line in config.describe_settings(c, columns=2).splitlines()]
    names = list(settings_read(c))
    half = -(-len(names) // 2)
    assert [row[0] for row in rows] == names[:half]
    assert [row[2] for row in rows if len(row) > 2] == names[half:]
    assert ["lr", "0.0005"] in [row[k : k + 2] for row in rows for k in (0, 2)]


# --------------------------------------------------------------------------------- the command line


def test_every_option_is_a_flag_of_its_type():
    argv = "--objective dro --tau 0.5 --share-networks --steps 7 --data a.jsonl b.jsonl".split()
    c = command_line([*argv, "--data", "c.jsonl", "--no-shuffle-prompts"])
    assert (c.objective, c.tau, c.share_networks, c.steps) == ("dro", 0.5, True, 7)
    assert c.data == ["a.jsonl", "b.jsonl", "c.jsonl"] and c.shuffle_prompts is False
    assert command_line([]) == Config() and command_line([]).data is not Config().data


def test_help_names_every_option_its_choices_and_who_has_which_default(capsys):
    with pytest.raises(SystemExit) as end:
        command_line(["--help"], "what it is for")
    text = " ".join(capsys.readouterr().out.split())
    assert not end.value.code and "what it is for" in text
    for f in dataclasses.fields(Config):
        assert config.flag(f.name) in text
    assert f"what is minimised: {', '.join(OBJECTIVES)}" in text
    assert "synthetic world: dialogue, summary, tiny (default dialogue)" in text
    betas = {}
    for name, row in OBJECTIVES.items():
        if "beta" in row.defaults:
            betas.setdefault(row.defaults["beta"], []).append(name)
    shown = "; ".join(f"{beta} {', '.join(names)}" for beta, names in betas.items())
    assert f"(default {shown})" in text
    assert "(default 250; 400 summary; 120 tiny; 1600 dro)" in text  # --steps
    assert "(default 512; 1024 files)" in text  # --vocab-size
    assert "its peak learning rate (default 0.003; 0.002 summary)" in text  # --reference-lr


def test_a_resumed_run_takes_its_settings_and_refuses_others(finished):
    folder, _ = finished
    c = command_line(["--resume", str(folder), "--device", "auto"])
    assert (c.resume, c.out, c.steps, c.device) == (str(folder), str(folder), 12, "cpu")
    with pytest.raises(ConfigError, match=f"lr: {c.lr} there, 0.01 here"):
        command_line(["--resume", str(folder), "--lr", "0.01"])
    with pytest.raises(ConfigError, match="leave --out away"):
        command_line(["--resume", str(folder), "--out", "elsewhere"])
    with pytest.raises(ConfigError, match="no config.json"):
        command_line(["--resume", str(folder / "nothing")])


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "config.json is damaged"),
        ("{", "config.json is damaged"),
        ("{}", "config.json is damaged"),
        ("[1]", "config.json is damaged"),
        ("null", "config.json is damaged"),
        ('"seed"', "config.json is damaged"),
        ("\x00\xff", "config.json is damaged"),
        ("[" * 100_000, "config.json is damaged"),
        ('{"seed": ' + "[" * 100_000 + "]" * 100_000 + "}", "config.json is damaged"),
        ('{"seed": ' + '{"a": ' * 100_000, "config.json is damaged"),
        ('{"optimizer": "adamw"}', r"of another version \(it has optimizer\)"),
        ('{"seed": 1, "step": 2}', r"of another version \(it has step\)"),
    ],
    ids=lambda text: text[:12],
)
def test_a_config_that_is_damaged_or_of_another_version_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=message) as error:
        command_line(["--resume", str(tmp_path)])
    assert "\n" not in str(error.value)


RIGHT = {int: (int,), float: (int, float), bool: (bool,), str: (str,), list: (list,)}


@pytest.mark.parametrize("name", [name for name in vars(Config()) if name not in ("out", "resume")])
def test_a_config_of_wrong_types_is_refused_and_null_is_where_nothing_was_given(tmp_path, name):
    field = Config.__dataclass_fields__[name]
    values = [True, 3, 0.5, "text", [], [1], [None], ["a", ["b"]], {}, {"a": 1}]
    for value in values:
        if type(value) in RIGHT[config.kind_of(field)] and value in ([], *values[:4]):
            continue
        (tmp_path / "config.json").write_text(json.dumps({"seed": 0, name: value}))
        with pytest.raises(ConfigError, match=f"config.json is damaged .*{config.flag(name)} "):
            command_line(["--resume", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0, name: None}))
    if field.default is None:
        assert getattr(command_line(["--resume", str(tmp_path)]), name) is None
    else:
        with pytest.raises(ConfigError, match=f"config.json is damaged .*{config.flag(name)} None"):
            command_line(["--resume", str(tmp_path)])


def test_a_config_nested_almost_too_deep_is_refused_like_any_other(tmp_path):
    for depth in range(800, 1000, 3):
        (tmp_path / "config.json").write_text('{"seed": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ConfigError, match="config.json is damaged"):
            command_line(["--resume", str(tmp_path)])


def test_flags_and_config_are_the_same_settings(tmp_path):
    assert command_line(flags(tmp_path, seed=5)) == small(str(tmp_path), seed=5)


def test_the_default_rate_of_a_t5_is_half_that_of_a_gpt_and_a_given_one_is_as_given():
    rate = lambda **own: resolve(Config(**own)).lr
    assert rate(model="t5") == rate() / 2 == OBJECTIVES["lire"].defaults["lr"] / 2
    assert rate(model="t5", lr=3e-4) == 3e-4


def test_a_run_of_few_steps_has_as_many_rounds_at_most():
    rounds = lambda **own: resolve(Config(**own)).evolve
    assert (rounds(), rounds(steps=4), rounds(steps=0), rounds(steps=0, evolve=0)) == (10, 4, 1, 0)
    assert rounds(steps=4, evolve=2) == 2 and rounds(steps=4, data=["x.jsonl"]) == 0


def test_dro_reads_many_prompts_on_a_task_unless_the_task_or_the_user_says_otherwise():
    size = lambda **own: [
        getattr(resolve(Config(objective="dro", out="x", **own)), name)
        for name in ("candidates", "batch_size", "steps")
    ]
    assert size() == [2, 64, 1600] and size(batch_size=16) == [2, 16, 1600]
    assert size(task="tiny") == [8, 16, 120]
    assert size(data=["x.jsonl"]) == [None, 16, 250]
    assert resolve(Config(out="x")).batch_size == 16
