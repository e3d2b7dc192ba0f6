"""What can be set: the options of a run, their defaults, and what is refused."""

import dataclasses
import itertools
import json
import math
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from files import asked_format
from harness.pretrained import read_folder
from objectives import NEEDS, OBJECTIVES
from records import DataError, short
from tasks import TASKS


class ConfigError(ValueError):
    """A setting is impossible; the message is one line for the person who set it."""

    def __init__(self, message: str) -> None:
        super().__init__(short(message, 300))


def option(default: Any, text: str, choices: Collection = (), positive: bool = False) -> Any:
    """A field of Config: its default, and what --help and the refusals say about it.

    Args: default: None where it depends on other settings (`run_defaults`), `list` for a list;
        choices: the values it may have, such as a table; positive: 0 is refused too.
    """
    how = {"default_factory": list} if default is list else {"default": default}
    return field(metadata={"text": text, "choices": choices, "positive": positive}, **how)


@dataclass
class Config:
    """Everything a run depends on. Every field is an option: `sft_weight` is --sft-weight."""

    objective: str = option("lire", "what is minimised", OBJECTIVES)
    task: str = option("dialogue", "synthetic world", TASKS)
    data: list[str] = option(
        list, "files of lists instead of a task: .jsonl .json .csv .parquet, .gz, - for stdin"
    )
    eval_data: list[str] = option(list, "held-out lists; without it 10 % of the prompts of --data")
    format: str = option(
        "", "of --data where it is not recognised: NAME or NAME:REWARD, docs/data.md"
    )
    threshold: float | None = option(None, "labels above it are thumbs up; default: true and 1 are")
    limit: int = option(0, "use the first so many lists of --data, 0 for all")
    reward: str = option(
        "", "FILE.py:function, (prompt, response) -> number: --data's prompts get what a task has"
    )
    max_prompt: int = option(
        256, "tokens of a prompt, a longer one loses its beginning", positive=True
    )
    max_response: int = option(
        128, "tokens of a response, a longer one loses its end", positive=True
    )
    init: str = option(
        "", "the folder of a GPT-2 or T5 v1.1 (Hugging Face), or of a run, to start from its policy"
    )
    model: str | None = option(None, "what policy and reference are", ("gpt", "t5"))
    layers: int | None = option(
        None, "layers of the model; t5: of encoder and decoder each", positive=True
    )
    heads: int | None = option(None, "attention heads of each layer", positive=True)
    width: int | None = option(None, "width of the model", positive=True)
    tokenizer: str | None = option(None, "bpe is trained on the run's own text", ("bpe", "gpt2"))
    vocab_size: int | None = option(None, "tokens of bpe")
    reference_steps: int | None = option(None, "SFT steps of the reference")
    reference_lr: float | None = option(None, "its peak learning rate", positive=True)
    reference_batch: int = option(16, "lists a step of its SFT", positive=True)
    candidates: int | None = option(
        None, "M: responses sampled a prompt; of a file's lists the first M", positive=True
    )
    sample_temperature: float = option(1.0, "of the pools; evaluation samples at 1", positive=True)
    evolve: int | None = option(None, "rounds, each with a new pool; 0: the data's own lists")
    iterate: int | None = option(None, "passes over the pool of a round", positive=True)
    temperature: float | None = option(None, "LIRE's T", positive=True)
    score: str | None = option(None, "of the token log-probs, what LIRE compares", ("sum", "mean"))
    reward_norm: str | None = option(
        None,
        "softmax, zscore: within a list; global: z-scored over the first pool",
        ("softmax", "zscore", "global", "none"),
    )
    sft_weight: float | None = option(None, "weight of the best candidate's -log pi per token")
    tau: float | None = option(
        None, "KL strength, in units of the normalised reward", positive=True
    )
    beta: float | None = option(None, "KL strength", positive=True)
    desirable: str | None = option(
        None, "KTO: above the batch's mean, or above 0 (of thumbs)", ("mean", "positive")
    )
    desirable_weight: float | None = option(
        None, "KTO: of the loss of desirable responses", positive=True
    )
    value: str | None = option(None, "DRO's V: one a prompt or a batch", ("prompt", "batch"))
    value_lr: float | None = option(None, "peak learning rate of V, default --lr", positive=True)
    share_networks: bool | None = option(None, "V is a head on the policy's own states")
    shuffle_prompts: bool = option(False, "control: train every list under another prompt")
    steps: int | None = option(None, "optimiser steps in all, over all rounds")
    batch_size: int | None = option(None, "B, prompts a step", positive=True)
    grad_accum: int = option(
        1, "parts that a batch is read in: less memory, the same update", positive=True
    )
    lr: float | None = option(
        None, "peak learning rate, of a t5 half; warm-up 3 %, then linear to 0", positive=True
    )
    clip: float = option(1.0, "gradient norm, of each network by itself", positive=True)
    eval_prompts: int | None = option(None, "prompts of each evaluation split", positive=True)
    eval_samples: int | None = option(None, "responses a prompt of each model", positive=True)
    eval_every: int = option(50, "steps between quick evaluations and checkpoints", positive=True)
    seed: int = option(0, "of all random numbers")
    device: str = option("auto", "where it runs", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "float32", "of the computation; weights stay float32", ("float32", "bfloat16")
    )
    out: str = option("", "folder of the run, default out/<objective>-<data>-<seed>")
    resume: str = option("", "go on with this run")


ON_TASKS = {
    "model": "gpt",
    "layers": 2,
    "heads": 4,
    "width": 128,
    "tokenizer": "bpe",
    "vocab_size": 512,
    "reference_steps": 500,
    "reference_lr": 3e-3,
    "candidates": 8,
    "batch_size": 16,
    "iterate": 1,
    "steps": 250,
    "eval_prompts": 48,
    "eval_samples": 64,
}
ON_EVERY_RUN = {"lr", "evolve", "reward_norm", *ON_TASKS}
ON_EVERY_RUN |= {f.name for f in dataclasses.fields(Config) if f.default is not None}
ON_FILES = {**ON_TASKS, "vocab_size": 1024, "reference_steps": 300, "candidates": None}


T5_RATE = 0.5  # of a GPT's --lr: at the whole, LIRE's policy leaves the language (KL 20)
HUB_RATE = 0.01  # of both rates for a model from elsewhere: they suit one of 0.5 M weights


def run_defaults(config: Config) -> dict[str, Any]:
    """The defaults that depend on objective and data, for options that are None."""
    row = OBJECTIVES[config.objective]
    objective = row.run_defaults()
    objective["lr"] *= T5_RATE if config.model == "t5" else 1
    if config.data and config.reward:
        defaults = ON_FILES | {"candidates": ON_TASKS["candidates"]} | objective
    elif config.data:  # a file has no reward for new samples
        defaults = ON_FILES | objective | {"evolve": 0}
    else:
        defaults = ON_TASKS | objective | row.on_tasks | TASKS[config.task].defaults
    if config.init:
        defaults |= {"tokenizer": None, "vocab_size": None, "reference_steps": 0}
        rate = HUB_RATE if read_folder(config.init).from_elsewhere else 1
        defaults |= {name: rate * defaults[name] for name in ("lr", "reference_lr")}
    return defaults


def model_of_init(config: Config) -> dict[str, Any]:
    """The model and its size in --init's folder.

    Raises: ConfigError where there is none, or where it does not fit what is asked for.
    """
    try:
        found = read_folder(config.init)
    except DataError as e:
        way_on = "; if it has moved, give --init beside --resume" if config.resume else ""
        raise ConfigError(f"--init {e}{way_on}") from None
    own = {"model": found.model, "tokenizer": None, "vocab_size": None}
    own |= {name: getattr(found.config, name) for name in ("layers", "heads", "width")}
    for name, value in own.items():
        if getattr(config, name) not in (None, value):
            there = f"there it is {value}" if value else "a folder has its own"
            raise ConfigError(
                f"{flag(name)} {getattr(config, name)} with --init {config.init}: {there}"
            )
    positions, most = config.max_prompt + config.max_response, found.positions
    if positions > most:
        raise ConfigError(
            f"--init {config.init} reads {most} tokens, and --max-prompt {config.max_prompt} with "
            f"--max-response {config.max_response} are {positions}"
        )
    return own


def owners(name: str) -> list[str]:
    """The objectives that read an option, where it is not one of every run."""
    if name in ON_EVERY_RUN:
        return []
    return [objective for objective, row in OBJECTIVES.items() if name in row.defaults]


def flag(name: str) -> str:
    """The option of a field: sft_weight is --sft-weight."""
    return "--" + name.replace("_", "-")


def resolve(config: Config) -> Config:
    """Fill in the defaults, and refuse impossible values.

    Returns: a new Config. Raises: ConfigError.
    """
    # Each value by itself; then options that only other objectives read.
    check_values(config)
    row = OBJECTIVES[config.objective]
    for f in dataclasses.fields(Config):
        readers = owners(f.name)
        if readers and config.objective not in readers and getattr(config, f.name) is not None:
            raise ConfigError(
                f"{flag(f.name)} is an option of {', '.join(readers)}: --objective "
                f"{config.objective} does not read it"
            )
    # Defaults before the rest, because the rest is about the values that the run will have.
    if config.init:
        config = dataclasses.replace(config, **model_of_init(config))
    defaults = run_defaults(config)
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    c = dataclasses.replace(config, **missing)
    if config.evolve is None:  # a round has an update at least
        c = dataclasses.replace(c, evolve=min(c.evolve, max(c.steps, 1)))

    # Values that don't go together.
    if c.reward_norm not in row.reward_norm:
        raise ConfigError(
            f"--reward-norm {c.reward_norm}: --objective {c.objective} takes "
            f"{' or '.join(row.reward_norm)}"
        )
    if not c.init:
        _check_size(c)
    if c.data and c.evolve and not c.reward:
        raise ConfigError(
            f"--evolve {c.evolve} samples and scores new responses, but a file has no reward "
            "function: leave it at 0, or give one with --reward FILE.py:function"
        )
    if c.reward and not c.data:
        raise ConfigError("--reward goes with --data: a task has its own")
    if 0 < c.steps < c.evolve:
        raise ConfigError(
            f"--evolve {c.evolve}: every round needs an update, and --steps is {c.steps}"
        )
    for name in ("eval_data", "format", "threshold"):
        if getattr(c, name) not in ("", [], None) and not c.data:
            raise ConfigError(f"{flag(name)} goes with --data")
    if c.format and (reason := asked_format(c.format)):
        raise ConfigError(f"--format {short(c.format)}: {reason}")
    if "batch" in row.needs and c.batch_size < 2:
        raise ConfigError(
            f"--objective {c.objective} {NEEDS['batch']}: --batch-size must be at least 2, got 1"
        )
    if c.grad_accum > c.batch_size:
        raise ConfigError(
            f"--grad-accum {c.grad_accum}: a batch has --batch-size {c.batch_size} prompts, and so "
            "no more parts than that"
        )
    if why_lists(c) and c.candidates is not None and c.candidates < 2:
        raise ConfigError(
            f"--objective {c.objective} {why_lists(c)}: --candidates must be at least 2, got "
            f"{c.candidates}"
        )
    if reason := row.conflict(c):
        raise ConfigError(reason)
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA GPU")

    # What depends on the machine and on the folders that are there.
    device = c.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return dataclasses.replace(c, device=device, out=c.out or c.resume or _free_folder(c))


SMALLEST, LARGEST = 1e-9, 1e9  # of any positive number
MOST_WEIGHTS = 2e9  # of a model


def kind_of(option: dataclasses.Field) -> type:
    """The type of an option's value: int, float, bool, str or list."""
    kind = option.type
    if isinstance(kind, types.UnionType):  # float | None
        kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
    return typing.get_origin(kind) or kind


def check_values(config: Config) -> None:
    """Each option by itself: its type, among its choices, finite, in its range."""
    for f in dataclasses.fields(Config):
        value, choices, kind = getattr(config, f.name), f.metadata["choices"], kind_of(f)
        if value is None and f.default is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole if kind is int else isinstance(value, kind) or kind is float and whole):
            raise ConfigError(f"{flag(f.name)} {short(repr(value))}: expected {kind.__name__}")
        if kind is list and not all(isinstance(path, str) for path in value):
            raise ConfigError(f"{flag(f.name)} {short(repr(value))}: expected names of files")
        if choices and value not in choices:
            raise ConfigError(
                f"{flag(f.name)} {short(repr(value))}: choose from {', '.join(choices)}"
            )
        if kind not in (int, float):
            continue
        if not abs(value) < math.inf:  # math.isfinite fails at an int of 400 digits
            raise ConfigError(f"{flag(f.name)} must be finite, got {value}")
        if f.metadata["positive"] and not value > 0:
            raise ConfigError(f"{flag(f.name)} must be positive, got {short(value)}")
        if value < 0:
            raise ConfigError(f"{flag(f.name)} must not be negative, got {short(value)}")
        largest = 2**63 - 1 if f.name == "seed" else LARGEST
        if value > largest:
            raise ConfigError(f"{flag(f.name)} must be at most {largest:g}, got {short(value)}")
        if 0 < value < SMALLEST:
            raise ConfigError(f"{flag(f.name)} must be at least {SMALLEST:g}, got {value}")


def _check_size(c: Config) -> None:
    """A model that can't be made, or that no memory holds, is refused before it is."""
    if c.width % c.heads:
        raise ConfigError(f"--width {c.width} is not a multiple of --heads {c.heads}")
    if c.vocab_size < 257:
        raise ConfigError(
            f"--vocab-size must be at least 257 (256 bytes and EOS), got {c.vocab_size}"
        )
    positions = c.max_prompt + c.max_response
    weights = 12 * c.layers * c.width**2 + (c.vocab_size + positions) * c.width
    if weights > MOST_WEIGHTS:
        raise ConfigError(
            f"--layers {c.layers} --width {c.width} --vocab-size {c.vocab_size} --max-prompt "
            f"{c.max_prompt} --max-response {c.max_response} need {weights:.1e} weights, expected "
            f"at most {MOST_WEIGHTS:.0e}"
        )


def why_lists(c: Config) -> str:
    """Why the objective can't learn from single responses; empty where it can."""
    needs = OBJECTIVES[c.objective].needs
    return next((NEEDS[need] for need in ("lists", "pairs") if need in needs), "")


def learn_from_singles() -> list[str]:
    """The objectives that need no lists."""
    rows = OBJECTIVES.items()
    return [name for name, row in rows if row.loss and not row.needs & {"lists", "pairs"}]


def with_settings_of_the_data(c: Config, rewards: list[float]) -> Config:
    """The Config with what the training rewards decide.

    Raises: ConfigError where they teach nothing.
    """
    objective = OBJECTIVES[c.objective]
    if objective.loss is None:
        return c
    try:
        return dataclasses.replace(c, **objective.prepare(c, rewards))
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _free_folder(c: Config) -> str:
    """out/<objective>-<data>-<seed>, or with -2 and so on where that holds a run already."""
    data = Path(c.data[0]).name.split(".")[0][:80] if c.data else c.task
    name = f"{c.objective}-{data}-{c.seed}"
    folders = (Path("out") / (name if k == 1 else f"{name}-{k}") for k in itertools.count(1))
    return str(next(folder for folder in folders if not (folder / "config.json").exists()))


# --------------------------------------------------------------------------------- what a run reads


def settings_read(c: Config) -> dict[str, Any]:
    """The settings that this run reads, of a Config that `resolve` has filled in."""
    if c.data:
        unread = {"task"} if c.reward else {"eval_samples", "task"}
    else:
        unread = {"data", "eval_data", "format", "threshold", "limit", *TASKS[c.task].unread}
    if not c.evolve:
        unread |= {"sample_temperature", "iterate"} if c.data else {"sample_temperature"}
    if c.tokenizer != "bpe":
        unread.add("vocab_size")
    if not c.reference_steps:
        unread |= {"reference_lr", "reference_batch"}
    if OBJECTIVES[c.objective].loss is None:
        unread |= set("candidates evolve iterate reward_norm shuffle_prompts steps lr clip".split())
        unread |= {"sample_temperature", "eval_every", "batch_size", "grad_accum"}
    return {k: v for k, v in vars(c).items() if k not in unread and v not in ("", [], None)}


def describe_settings(c: Config, columns: int = 3) -> str:
    """The settings that this run reads, in columns."""
    settings = {k: f"{v:g}" if isinstance(v, float) else v for k, v in settings_read(c).items()}
    settings |= {k: " ".join(v) for k, v in settings.items() if isinstance(v, list)}
    cells = [f"{name:18} {value!s:14}" for name, value in settings.items()]
    rows = -(-len(cells) // columns)
    return "\n".join("  ".join(cells[i::rows]).rstrip() for i in range(rows))


def run_settings(c: Config) -> dict[str, Any]:
    """The config without the two folders, which may move."""
    return {k: v for k, v in vars(c).items() if k not in ("out", "resume")}


# They may move: a checkpoint is held to what is in them.
FILES = ("data", "eval_data", "reward", "init")


def difference(there: dict, here: dict) -> str:
    """What differs between two flat dicts, in words; empty where nothing does."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    shown = [(k, short(repr(there.get(k))), short(repr(here.get(k)))) for k in names]
    return ", ".join(f"{name}: {old} there, {new} here" for name, old, new in shown)


def read_json(path: str | Path) -> dict | None:
    """The object in a JSON file; None where there is none, or where it is damaged."""
    try:
        return read_object(Path(path).read_text())
    except (OSError, ValueError):
        return None


def read_object(text: str) -> dict | None:
    """The object that a JSON text is; None where it is something else, or damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
