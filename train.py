"""Align a small language model offline, and measure it against the exact optimum.

    python train.py --objective lire                                    the main job: synthetic dialogue, about 90 s on two cores
    python train.py --objective dro --model t5 --task summary --seed 1  another objective, model, task and seed
    python train.py --objective lire --data lists.jsonl --score mean    your own preference lists

A run makes the data, trains (or finds) the reference model, samples and scores a pool of M candidates a prompt, trains the
policy on it, evaluates it on prompts never trained on, and writes out/<run>/. `main(config)` returns the metrics.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch

import baselines
import data
import dro
import frontier
import lire
import model as models
import tasks


def option(default, text: str):
    """A field of Config: its default (`list` for a list), and its text for --help."""
    how = {"default_factory": list} if default is list else {"default": default}
    return field(metadata={"help": text}, **how)


@dataclass
class Config:
    """Everything a run depends on. Every field is an option of the command line: `sft_weight` is --sft-weight.

    None is a default that depends on other settings: BEST and resolve, below, have it.
    """

    objective: str = option(
        "lire",
        "lire, dro, dro-p, dpo, ipo, pl-dpo, kto, rrhf, slic, pro, or sft: just the reference",
    )
    task: str = option("dialogue", "synthetic task: dialogue, summary or tiny")
    data: list[str] = option(
        list,
        "files of preference lists instead of a task (.jsonl, .jsonl.gz)",
    )
    eval_data: list[str] = option(list, "held-out lists; without it 10 % of the prompts of --data")
    limit: int = option(0, "use the first so many lists of --data, 0 for all")
    max_prompt: int = option(256, "tokens of a prompt, a longer one loses its beginning")
    max_response: int = option(128, "tokens of a response, a longer one loses its end")
    model: str = option("gpt", "gpt or t5")
    layers: int = option(2, "of the model; t5: of encoder and decoder each")
    heads: int = option(4, "of each layer")
    width: int = option(128, "of the model")
    tokenizer: str = option("bpe", "bpe: trained on the run's own text; gpt2: tiktoken's")
    vocab_size: int | None = option(None, "of bpe; default 512 for tasks, 1024 for files")
    reference_steps: int | None = option(
        None,
        "SFT steps of the reference; default 600 for tasks, 300 for files",
    )
    reference_lr: float | None = option(
        None,
        "its peak learning rate; default 4e-3, for summary 2e-3",
    )
    candidates: int | None = option(
        None,
        "M: sampled for each prompt, default 8; of a file's lists the first M, default all",
    )
    behaviour: str = option(
        "policy",
        "who answers in the pools: policy, reference, or uniform (tiny: any response)",
    )
    sample_temperature: float = option(1.0, "of the pool alone; evaluation samples at 1")
    evolve: int | None = option(
        None,
        "rounds, each with a new pool; default 5, for files 0: their own lists",
    )
    iterate: int = option(1, "Iterate passes over the pool of a round")
    temperature: float | None = option(None, "LIRE's T")
    score: str = option("sum", "sum or mean of the token log-probs, the score that LIRE compares")
    reward_norm: str | None = option(
        None,
        "softmax, list-zscore, global, none; default softmax: lire, global: dro, pro",
    )
    sft_weight: float | None = option(
        None,
        "weight of the SFT term on the best candidate (lire, rrhf, slic, pro)",
    )
    tau: float | None = option(None, "DRO's KL strength, in units of the normalised reward")
    beta: float | None = option(None, "KL strength of dpo, ipo, pl-dpo and kto")
    pairs: str = option(
        "best-worst",
        "dpo, ipo, slic: best against worst of a list, or all pairs of unlike reward",
    )
    desirable: str | None = option(
        None,
        "KTO: above the batch's mean, or positive: above 0 (default for thumbs)",
    )
    value: str = option("prompt", "DRO's V: one for each prompt, or one for the batch")
    value_lr: float | None = option(None, "peak learning rate of the value network; default lr")
    share_networks: bool = option(
        False,
        "V is a head on the policy's own states, instead of a network of its own",
    )
    shuffle_prompts: bool = option(False, "control: train every list under another prompt")
    steps: int = option(400, "optimiser steps in all, over all rounds")
    batch_size: int = option(16, "B, prompts a step")
    optimizer: str = option("adamw", "adamw, or adafactor, which the DRO paper used")
    lr: float | None = option(None, "peak learning rate, warm-up 3 %, then linear to 0")
    weight_decay: float = option(0.0, "of the optimizer")
    clip: float = option(1.0, "gradient norm, of each network by itself")
    eval_prompts: int = option(64, "prompts of each evaluation split")
    eval_samples: int = option(
        64,
        "responses a prompt from the policy and as many from the reference",
    )
    eval_every: int = option(50, "steps between quick evaluations and checkpoints")
    seed: int = option(0, "of everything random")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("float32", "float32 or bfloat16 (autocast; weights stay float32)")
    compile: bool = option(False, "torch.compile the model: pays on long runs")
    out: str = option("", "folder of the run; default out/<objective>-<task>-<seed>")
    resume: str = option("", "go on with this run")


class ConfigError(ValueError):
    """A setting is impossible; the message is one line for the person who set it."""


CHOICES = {
    "task": ("dialogue", "summary", "tiny"),
    "model": ("gpt", "t5"),
    "tokenizer": ("bpe", "gpt2"),
    "behaviour": ("policy", "reference", "uniform"),
    "score": ("sum", "mean"),
    "reward_norm": ("softmax", "list-zscore", "global", "none"),
    "desirable": (None, "mean", "positive"),
    "pairs": ("best-worst", "all"),
    "value": ("prompt", "batch"),
    "optimizer": ("adamw", "adafactor"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
}
LISTS = (
    "lire",
    "dpo",
    "ipo",
    "pl-dpo",
    "rrhf",
    "slic",
    "pro",
)  # these compare the candidates of a list
BEST = {  # default learning rate and strength: most reward in `python -m experiments.compare --grid`, results/grid.json
    "lire": {"lr": 1e-3, "temperature": 4.0, "sft_weight": 0.1},
    "dro": {"lr": 1e-3, "tau": 0.1},
    "dro-p": {"lr": 1e-3, "tau": 0.1},
    "dpo": {"lr": 2e-4, "beta": 0.03},
    "ipo": {"lr": 1e-3, "beta": 0.03},
    "pl-dpo": {"lr": 1e-3, "beta": 0.3},
    "kto": {"lr": 1e-3, "beta": 1.0},
    "rrhf": {"lr": 1e-3, "sft_weight": 30.0},
    "slic": {"lr": 1e-3, "sft_weight": 3.0},
    "pro": {"lr": 1e-3, "sft_weight": 0.15},
    "sft": {"lr": 5e-4},  # of no step: the reference has a rate of its own
}
OWN = {  # options that only some objectives read
    "tau": ("dro", "dro-p"),
    "beta": ("dpo", "ipo", "pl-dpo", "kto"),
    "temperature": ("lire",),
    "score": ("lire",),
    "sft_weight": ("lire", "rrhf", "slic", "pro"),
    "pairs": ("dpo", "ipo", "slic"),
    "desirable": ("kto",),
    "value": ("dro",),
    "value_lr": ("dro",),
    "share_networks": ("dro",),
}
POSITIVE = (
    "layers heads width max_prompt max_response candidates iterate batch_size lr reference_lr temperature sample_temperature "
    "tau beta value_lr clip eval_prompts eval_samples eval_every"
).split()


def resolve(config: Config) -> Config:
    """Fill in the defaults that depend on other settings, and refuse impossible values with one line."""
    c, files = dataclasses.replace(config), bool(config.data)
    for name, owners in OWN.items():
        if (
            c.objective in BEST
            and c.objective not in owners
            and getattr(c, name) != getattr(Config, name)
        ):
            raise ConfigError(
                f"--{name.replace('_', '-')} is an option of {', '.join(owners)}: --objective {c.objective} does not read it"
            )
    c.vocab_size = c.vocab_size if c.vocab_size is not None else 1024 if files else 512
    c.reference_steps = (
        c.reference_steps if c.reference_steps is not None else 300 if files else 600
    )
    if (
        c.reference_lr is None
    ):  # copying out of a post of 70 tokens is learnt sooner at half the rate
        c.reference_lr = 2e-3 if c.task == "summary" and not files else 4e-3
    c.evolve = c.evolve if c.evolve is not None else 0 if files else 5
    c.candidates = 8 if c.candidates is None and not files else c.candidates
    c.reward_norm = c.reward_norm or {
        "lire": "softmax",
        "dro": "global",
        "dro-p": "global",
        "pro": "global",
    }.get(c.objective, "none")
    for name, value in BEST.get(c.objective, {"lr": 5e-4}).items():
        setattr(c, name, value if getattr(c, name) is None else getattr(c, name))
    if c.objective == "kto" and not files:
        c.desirable = c.desirable or "mean"
    for name, choices in CHOICES.items():
        if getattr(c, name) not in choices:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(c, name)!r}: choose from {', '.join(filter(None, choices))}"
            )
    for name, value in vars(c).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} must be finite, got {value}")
        if name in POSITIVE and value is not None and not value > 0:
            raise ConfigError(f"{flag} must be positive, got {value}")
        if isinstance(value, (int, float)) and value < 0:
            raise ConfigError(f"{flag} must not be negative, got {value}")
    if c.width % c.heads:
        raise ConfigError(f"--width {c.width} is not a multiple of --heads {c.heads}")
    if c.vocab_size < 257:
        raise ConfigError(
            f"--vocab-size must be at least 257 (256 bytes and EOS), got {c.vocab_size}"
        )
    if files and c.evolve:
        raise ConfigError(
            f"--evolve {c.evolve} samples and scores new responses, but a file has no reward function: leave it at 0"
        )
    if c.behaviour == "uniform" and (files or c.task != "tiny"):
        raise ConfigError(
            "--behaviour uniform draws from all responses there are, which only --task tiny can name"
        )
    if c.behaviour != "policy" and not c.evolve:
        raise ConfigError(
            f"--behaviour {c.behaviour} is about sampled pools, and --evolve 0 samples none"
        )
    if c.objective in ("dro", "dro-p", "kto", *LISTS[1:]) and c.reward_norm not in (
        "global",
        "none",
    ):
        raise ConfigError(
            f"--reward-norm {c.reward_norm} is LIRE's: --objective {c.objective} takes global or none"
        )
    if c.objective in ("kto", "dro-p") and c.batch_size < 2:
        raise ConfigError(
            f"--objective {c.objective} compares the responses of a batch: --batch-size must be at least 2, got 1"
        )
    if c.objective == "kto" and c.desirable == "positive" and c.reward_norm == "global":
        raise ConfigError(
            "--desirable positive is about the rewards as they are: leave --reward-norm global away"
        )
    if c.share_networks and c.value_lr is not None:
        raise ConfigError(
            "--value-lr is of a value network of its own: leave it or --share-networks away"
        )
    if c.optimizer == "adafactor" and not hasattr(torch.optim, "Adafactor"):
        raise ConfigError(
            f"--optimizer adafactor needs torch 2.5 or newer, this is {torch.__version__}"
        )
    if c.eval_data and not files:
        raise ConfigError("--eval-data goes with --data")
    if c.objective in LISTS and c.candidates is not None and c.candidates < 2:
        raise ConfigError(
            f"--objective {c.objective} compares the candidates of a list: --candidates must be at least 2, got {c.candidates}"
        )
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA GPU")
    if c.device == "auto":
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    c.out = (
        c.out
        or c.resume
        or free_folder(
            f"{c.objective}-{Path(c.data[0]).name.split('.')[0] if files else c.task}-{c.seed}"
        )
    )
    return c


def free_folder(name: str) -> str:
    """out/<name>, or out/<name>-2 and so on where that holds a run already."""
    folders = (Path("out") / (name if k == 1 else f"{name}-{k}") for k in itertools.count(1))
    return str(next(f for f in folders if not (f / "config.json").exists()))


# --------------------------------------------------------------------------------------------------------------- small tools


def rng(seed: int, *names, device="cpu") -> torch.Generator:
    """A generator for one purpose: what it draws depends on the seed and the names alone, so nothing needs to be saved."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def save(what, path) -> None:
    """Write under a temporary name, then rename: whoever reads `path` finds the old content or the new, never half of it."""
    path, part = Path(path), Path(f"{path}.{os.getpid()}.part")
    with open(part, "wb") as f:
        if isinstance(what, str):
            f.write(what.encode("utf-8", "replace"))
        else:
            torch.save(what, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def read_json(path) -> dict | None:
    """The object in a JSON file; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(Path(path).read_text())
        return found if isinstance(found, dict) else None


def digest_of(state: dict) -> str:
    """sha256 over the names and bytes of a state dict."""
    h = hashlib.sha256()
    for name, tensor in state.items():
        h.update(
            name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return h.hexdigest()


def precision(config: Config):
    """Autocast to bfloat16 where asked: the same for policy and reference, or their ratio would not start at 1."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")


class Progress:
    """One live line on a terminal; plain lines, one at each quick evaluation, in a log."""

    def __init__(self, what: str, total: int, first: int = 0):
        self.what, self.total, self.first = what, total, first
        self.start, self.shown = time.time(), 0.0
        self.live = sys.stdout.isatty()

    def show(self, step: int, text: str, line: bool = False):
        now = time.time()
        left = (now - self.start) / max(step - self.first, 1) * (self.total - step)
        text = f"{self.what} {step}/{self.total}  {text}  {left:.0f} s left"
        if self.live and (line or now - self.shown > 0.2):
            print("\r" + text.ljust(110), end="\n" if step == self.total else "", flush=True)
            self.shown = now
        elif line and not self.live:
            print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------ data, reference


@dataclass
class World:
    """What a run works on: tokens, training lists of the reference, evaluation prompts or lists, and the task if there is one."""

    enc: object  # tiktoken.Encoding
    task: data.Task | None
    allowed: torch.Tensor | None  # [max_response, V], tiny alone
    max_response: int
    ranks: dict | None = None  # of enc, None for gpt2
    logged: list = ()  # Examples the reference is trained on; with --evolve 0 also the pool
    heldout: list = ()  # Examples: held-out lists of a file, or prompts of a task
    ood: list = ()  # Examples: prompts about subjects never trained on
    train: list = ()  # Examples: training prompts of a task
    fingerprint: str = ""  # sha256 over all texts and rewards


def make_world(c: Config) -> World:
    """Synthetic task or files, tokenizer, tokenised lists. Nothing is written here, so bad data leaves nothing behind."""
    task, eval_records = None, []
    if c.data:
        records = data.load(c.data, c.limit)
        eval_records = data.load(c.eval_data) if c.eval_data else []
        if not c.eval_data:
            records, eval_records = data.split(records)
        held = {r["prompt"] for r in eval_records}
        if leaked := sum(r["prompt"] in held for r in records):
            records = [r for r in records if r["prompt"] not in held]
            print(f"{leaked} lists with a held-out prompt are left out of the training lists")
        if not records or not eval_records:
            raise data.DataError(
                f"{', '.join(c.data)}: {len(records)} lists to train on and {len(eval_records)} held out, expected some of "
                "both: give more lists, or held-out ones with --eval-data"
            )
        if c.objective in LISTS and all(len(r["responses"]) < 2 for r in records):
            raise ConfigError(
                f"--objective {c.objective} compares the candidates of a list, and every list here has a single response: it can't "
                "learn (--objective dro and kto can)"
            )
        if c.objective in LISTS and not any(
            len(set(r["rewards"][: c.candidates])) > 1 for r in records
        ):
            raise ConfigError(
                "no list has two responses of unlike reward: there is nothing to compare, and nothing to learn"
            )
        check_rewards(c, [x for r in records for x in r["rewards"][: c.candidates]])
    else:
        task = data.make_task(c.task, random.Random(c.seed))
        records = task.logged
    ranks = None
    if c.tokenizer == "gpt2":
        enc = data.gpt2_encoding()
    else:
        texts = (t for r in records for t in [r["prompt"], *(" " + y for y in r["responses"])])
        ranks = (
            data.word_ranks(task.vocabulary)
            if c.task == "tiny" and task
            else data.train_bpe(texts, c.vocab_size)
        )
        enc = data.encoding(ranks)
    if task and task.words and ranks is None:
        raise ConfigError("--task tiny has its own fixed vocabulary: leave --tokenizer at bpe")
    if task and task.words and c.max_response < task.max_response:
        raise ConfigError(
            f"--task tiny needs --max-response {task.max_response}, got {c.max_response}"
        )
    tokens = lambda records, say=lambda line: None: data.tokenize(
        records, enc, c.max_prompt, c.max_response, say
    )
    prompts = lambda split: tokens(
        [{"prompt": p, "responses": [], "rewards": []} for p in task.prompts[split]]
    )
    h = hashlib.sha256(json.dumps([records, eval_records]).encode())
    return World(
        enc=enc,
        ranks=ranks,
        task=task,
        logged=tokens(records, print if c.data else lambda line: None),
        heldout=prompts("heldout") if task else tokens(eval_records),
        ood=prompts("ood") if task else [],
        train=prompts("train") if task else [],
        allowed=data.allowed_tokens(task, enc).to(c.device) if task and task.words else None,
        max_response=min(c.max_response, task.max_response) if task else c.max_response,
        fingerprint=h.hexdigest(),
    )


def check_rewards(c: Config, rewards: list[float]) -> None:
    """Refuse rewards that leave nothing to learn; a file of thumbs, up 1 and down -1, tells KTO what is desirable."""
    if c.objective == "kto" and not c.desirable:
        c.desirable = "positive" if set(rewards) <= {1.0, -1.0} else "mean"
    if c.objective == "kto" and c.desirable == "positive":
        good = sum(r > 0 for r in rewards)
        if good in (0, len(rewards)):
            raise ConfigError(
                f"--objective kto needs desirable and undesirable responses, and none of these {len(rewards)} is "
                f"{'undesirable' if good else 'desirable'}"
            )
    elif max(rewards) == min(rewards) and c.objective != "sft":
        raise ConfigError(f"every reward is {rewards[0]}: there is nothing to learn")


def new_model(c: Config, world: World):
    """A model of the configured size with fresh weights, drawn from the seed alone."""
    enc, size = world.enc, {"layers": c.layers, "heads": c.heads, "width": c.width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        if c.model == "gpt":
            config = models.GPTConfig(
                enc.n_vocab, c.max_prompt + c.max_response, eos=enc.eot_token, **size
            )
            return models.GPT(config).to(c.device)
        inner = {
            "head_width": c.width // c.heads,
            "mlp_width": 2 * c.width,
        }  # as T5 v1.1 small; base has 8/3
        config = models.T5Config(enc.n_vocab, eos=enc.eot_token, start=enc.n_vocab, **inner, **size)
        return models.T5(config).to(c.device)


def lr_at(step: int, steps: int, peak: float) -> float:
    """Warm-up over the first 3 % of the steps, then a straight line to 0."""
    warm = max(1, round(0.03 * steps))
    return peak * min((step + 1) / warm, (steps - step) / max(steps - warm, 1))


def optimizer_step(optimizer, loss, step: int, steps: int, clip: float) -> list[float]:
    """Backward; clip every parameter group (a network each) by itself; one step at the group's own learning rate.

    Returns: the groups' gradient norms before clipping; nothing is changed where one is not finite.
    """
    optimizer.zero_grad()
    loss.backward()
    norms = [
        torch.nn.utils.clip_grad_norm_(group["params"], clip).item()
        for group in optimizer.param_groups
    ]
    if all(map(math.isfinite, norms)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, group["peak"])
        optimizer.step()
    return norms


def train_reference(c: Config, world: World):
    """SFT on the logged responses, good and bad alike: mean negative log-likelihood per token."""
    model = new_model(c, world)
    optimizer = torch.optim.AdamW(
        [{"params": list(model.parameters()), "peak": c.reference_lr}], weight_decay=0.01
    )
    progress, batches = Progress("reference", c.reference_steps), []
    epoch = 0
    for step in range(c.reference_steps):
        if not batches:
            batches, epoch = (
                data.batch_order(world.logged, c.batch_size, rng(c.seed, "reference", epoch)),
                epoch + 1,
            )
        batch = data.make_batch(
            [world.logged[i] for i in batches.pop()], world.enc.eot_token, c.device
        )
        with precision(c):
            logps = models.response_logps(model, batch, world.allowed)
        loss = -logps.sum() / batch.response_mask.sum()
        [norm] = optimizer_step(optimizer, loss, step, c.reference_steps, 1.0)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"reference step {step}: loss is {loss.item()}; a smaller --reference-lr may help"
            )
        progress.show(
            step + 1,
            f"loss {loss.item():.3f}",
            line=(step + 1) % 200 == 0 or step + 1 == c.reference_steps,
        )
    return model


REFERENCE_SETTINGS = "max_prompt max_response model layers heads width tokenizer vocab_size reference_steps reference_lr batch_size".split()


def reference_parts(c: Config, world: World) -> dict[str, str]:
    """All that the reference depends on, one hash or value each: its cache key."""
    code = "".join(
        map(
            inspect.getsource,
            (train_reference, optimizer_step, lr_at, new_model, rng, make_world, precision),
        )
    )
    sources = {
        "tasks.py": inspect.getsource(tasks),
        "model.py": inspect.getsource(models),
        "data.py": inspect.getsource(data),
        "train.py's reference code": code,
    }
    parts = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in sources.items()}
    parts |= {
        "torch version": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "dtype": c.dtype,
        "device": c.device,
        "seed": str(c.seed),
        "texts": world.fingerprint[:16],
    }
    return parts | {
        f"--{name.replace('_', '-')}": str(getattr(c, name)) for name in REFERENCE_SETTINGS
    }


def get_reference(c: Config, world: World, checkpoint: dict | None = None):
    """The reference model: the run's own where it is resumed, else from the cache beside the run, else trained and cached.

    What is read is verified by its digest. Raises: ConfigError where a resumed run's own reference is damaged.
    """
    if checkpoint:
        model, path = new_model(c, world), Path(c.out) / "reference.pt"
        with contextlib.suppress(
            Exception
        ):  # a damaged file fails in many ways; the digest decides
            model.load_state_dict(torch.load(path, map_location=c.device, weights_only=True))
        if digest_of(model.state_dict()) != checkpoint["reference"]:
            raise ConfigError(
                f"--resume {c.resume}: {path} is damaged or not the reference that this run began with"
            )
        return model.eval()
    parts = reference_parts(c, world)
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = Path(c.out).parent / "reference"
    path = folder / f"{name}.pt"
    model = new_model(c, world)
    if path.exists():
        try:
            cached = torch.load(path, map_location=c.device, weights_only=True)
            if cached["digest"] != digest_of(cached["weights"]):
                raise ValueError("its weights do not match their digest")
            model.load_state_dict(cached["weights"])
            print(f"reference: {path} (cached)")
            return model.eval()
        except (
            Exception
        ) as e:  # damaged files fail in many ways, and all of them mean: train it again
            print(
                f"reference: {path} is damaged ({str(e).splitlines()[0][:80]}), training it again"
            )
    elif told := list(filter(None, map(read_json, sorted(folder.glob("*.json"))))):
        changed = min(([k for k in parts if old.get(k) != parts[k]] for old in told), key=len)
        print(f"reference: none cached for this; the nearest one differs in {', '.join(changed)}")
    model = train_reference(c, world).eval()
    weights = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save({"weights": weights, "digest": digest_of(weights)}, path)
    save(json.dumps(parts, indent=1), folder / f"{name}.json")
    return model


# ---------------------------------------------------------------------------------------------------------------------- pool


def score_examples(c: Config, world: World, model, examples) -> list:
    """log pi of every response of every example, [[float, ...], ...]; lists of like length share a batch."""
    logps = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    size = chunk_size(c, world, max((len(e.response_ids) for e in examples), default=1))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = data.make_batch([examples[i] for i in rows], world.enc.eot_token, c.device)
        with torch.no_grad(), precision(c):
            values = models.response_logps(model, batch, world.allowed).tolist()
        for i, row in zip(rows, values):
            logps[i] = row[: len(examples[i].response_ids)]
    return logps


def chunk_size(c: Config, world: World, M: int) -> int:
    """Prompts scored at a time: few, so that a chunk stays in the processor's cache; more on a GPU."""
    return max(
        1, int((3e6 if c.device == "cpu" else 1e8) / (M * world.max_response * world.enc.n_vocab))
    )


def with_responses(examples, lists) -> list:
    """The prompts of `examples` with other responses, as token ids, not rewarded and not scored yet."""
    return [
        dataclasses.replace(e, response_ids=ys, rewards=[0.0] * len(ys), ref_logps=None)
        for e, ys in zip(examples, lists)
    ]


def sample_lists(
    c: Config, world: World, model, examples, M: int, generator, temperature: float = 1.0
) -> list:
    """M sampled responses for the prompt of every example, as token ids: [[ids, ...], ...]."""
    lists = []
    size = max(1, 512 // M)
    for start in range(0, len(examples), size):
        prompts = with_responses(examples[start : start + size], [[[0]]] * size)
        batch = data.make_batch(prompts, world.enc.eot_token, c.device)
        with precision(c):
            ids, mask = models.sample(
                model,
                batch.prompt_ids,
                batch.prompt_mask,
                M,
                world.max_response,
                generator,
                temperature,
                allowed=world.allowed,
            )
        lengths = mask.sum(-1).tolist()
        lists += [[y[:n] for y, n in zip(row, ns)] for row, ns in zip(ids.tolist(), lengths)]
    return lists


def text_of(world: World, ids) -> str:
    """The text of response ids, without EOS."""
    return world.enc.decode([i for i in ids if i != world.enc.eot_token])


def rewarded(world: World, prompt: str, lists: list) -> list[float]:
    """The task's reward of every response of a prompt."""
    return [world.task.reward(prompt, text_of(world, ids)) for ids in lists]


# ------------------------------------------------------------------------------------------------------------------------ loss


def compute_loss(c: Config, logps, batch, values=None, mismatched=None):
    """The objective: log-probs [B, M] of a batch to its loss. The one place that knows the objectives.

    values: V(x) [B], for dro; mismatched: log-probs and reference log-probs [B] of mismatched pairs, for kto.
    Returns: one loss a list or a response, or a dict of several, whose means are added up.
    """
    mask, lengths = batch.candidate_mask, batch.response_mask.sum(-1)
    rewards = lire.transform_rewards(
        batch.rewards,
        mask,
        {"list-zscore": "zscore", "global": "none"}.get(c.reward_norm, c.reward_norm),
    )
    sft = (
        c.sft_weight * lire.sft_loss(logps, lengths, batch.rewards, mask) if c.sft_weight else 0.0
    )  # [B]
    if c.objective == "lire":
        return lire.lire_loss(listwise_scores(c, logps, batch), rewards, mask, c.temperature) + sft
    if c.objective == "dro":
        values = values[:, None].expand_as(mask)[
            mask
        ]  # every response counts once, and has its prompt's value
        policy, value = dro.dro_v_losses(
            logps[mask], batch.ref_logps[mask], rewards[mask], values, c.tau
        )
        return {"loss/policy": policy, "loss/value": value}
    if c.objective == "dro-p":
        return dro.dro_p_loss(logps[mask], batch.ref_logps[mask], rewards[mask], c.tau)
    if c.objective == "kto":
        earned = batch.rewards[mask].double()
        desirable = earned > (0 if c.desirable == "positive" else earned.mean())
        loss = baselines.kto_loss(
            logps[mask], batch.ref_logps[mask], desirable, *mismatched, c.beta
        )
        contrast = earned.max() > earned.min() or c.desirable == "positive"
        return loss * contrast  # where all earn the same, nobody is above the mean or below it
    if c.objective in ("dpo", "ipo", "slic"):
        of_list, chosen, rejected = preference_pairs(c, batch)  # [N] each; a batch of ties has none
        pair, ref_pair = (
            [x[of_list, j] for j in (chosen, rejected)] for x in (logps, batch.ref_logps)
        )
        if c.objective == "slic":
            loss = baselines.slic_loss(*pair)
        else:
            loss = (baselines.dpo_loss if c.objective == "dpo" else baselines.ipo_loss)(
                *pair, *ref_pair, c.beta
            )
        loss = loss if len(loss) else torch.where(mask, logps, 0.0).sum(-1) * 0
        return (
            {"loss/rank": loss, "loss/sft": sft} if c.objective == "slic" and c.sft_weight else loss
        )
    if c.objective == "pl-dpo":  # equal rewards have no order: a list of them alone teaches nothing
        unlike = best_and_worst(batch)[2]
        return unlike * baselines.plackett_luce_loss(logps, batch.ref_logps, rewards, mask, c.beta)
    if c.objective == "rrhf":
        return baselines.rrhf_loss(logps, lengths, rewards, mask) + sft
    if c.objective == "pro":
        return baselines.pro_loss(logps, lengths, rewards, mask) + (mask.sum(-1) - 1) ** 2 * sft
    if c.objective == "sft":  # the reference is all there is to train
        return -logps.sum(-1) / lengths.sum(-1)
    raise ConfigError(
        f"--objective {c.objective!r} is unknown: compute_loss in train.py knows lire, dro, dro-p, "
        "dpo, ipo, pl-dpo, kto, rrhf, slic, pro and sft"
    )


def listwise_scores(c: Config, logps, batch):
    """What LIRE's softmax compares [B, M]: log-probs, or their mean over tokens."""
    return logps / batch.response_mask.sum(-1).clamp_min(1) if c.score == "mean" else logps


def best_and_worst(batch):
    """Indices [B] of the best and the worst candidate of every list, and [B] bool: do they differ in reward?"""
    mask, rewards = batch.candidate_mask, batch.rewards
    best = rewards.masked_fill(~mask, -torch.inf).argmax(-1)
    worst = rewards.masked_fill(~mask, torch.inf).argmin(-1)
    rows = torch.arange(len(mask), device=mask.device)
    return best, worst, rewards[rows, best] > rewards[rows, worst]


def preference_pairs(c: Config, batch):
    """Indices [N] of list, chosen and rejected candidate: best against worst of every list, or all pairs of unlike reward."""
    if c.pairs == "best-worst":
        best, worst, unlike = best_and_worst(batch)
        return unlike.nonzero()[:, 0], best[unlike], worst[unlike]
    mask, rewards = batch.candidate_mask, batch.rewards
    better = (
        (rewards[:, :, None] > rewards[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    )  # [B, chosen, rejected]
    return better.nonzero(as_tuple=True)


def try_objective(c: Config) -> None:
    """Run compute_loss once on made-up numbers, so that a wrong name or a bug in a new loss shows before the work begins."""
    generator, ids = torch.Generator().manual_seed(0), torch.ones(2, 3, 4, dtype=torch.long)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    response_mask = mask[..., None].expand(2, 3, 4)
    rewards, logps = (
        torch.rand(2, 3, generator=generator),
        torch.randn(2, 3, generator=generator).requires_grad_(),
    )
    batch = data.Batch(
        ids[:, 0], ids[:, 0].bool(), ids, response_mask, mask, rewards, logps.detach()
    )
    total(compute_loss(c, logps, batch, rewards[:, 0], (rewards[:, 1], rewards[:, 2]))).backward()


def total(losses):
    """The number to minimise: the mean of what compute_loss gave, or the sum of the means."""
    return (
        sum(part.mean() for part in losses.values()) if isinstance(losses, dict) else losses.mean()
    )


@torch.no_grad()
def batch_metrics(c: Config, logps, batch, losses, values=None) -> dict:
    """What is logged of a step: the names TRL uses where the meaning is the same. Best and worst candidate for chosen, rejected."""
    mask, rewards = batch.candidate_mask, batch.rewards
    strength = c.tau or c.beta or 1.0
    implied = strength * (logps - batch.ref_logps)  # [B, M]
    m = {name: part.mean() for name, part in losses.items()} if isinstance(losses, dict) else {}
    if mask.sum(-1).max() > 1:
        best, worst, unlike = best_and_worst(batch)  # a tie or a single response is no comparison
        rows = unlike.nonzero()[:, 0]
        best, worst = (rows, best[unlike]), (rows, worst[unlike])
        chosen, rejected = implied[best], implied[worst]
        m |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": logps[best],
            "logps/rejected": logps[worst],
        }
    if c.objective == "lire":
        P = lire.candidate_probs(listwise_scores(c, logps, batch), mask, c.temperature)
        m |= {
            "rewards/expected": (P * rewards).sum(-1),
            "candidates/entropy": -torch.where(P > 0, P * P.clamp_min(1e-30).log(), 0.0).sum(-1),
            "candidates/max_prob": P.max(-1).values,
            "candidates/collapsed": ((P.max(-1).values > 0.99) & (mask.sum(-1) > 1)).float(),
        }
    else:
        m["rewards/implied"] = implied[mask]
        m["rewards/correlation"] = correlation(implied[mask], rewards[mask])
    if c.objective == "dro":
        target, values = (rewards - implied)[mask], values[:, None].expand_as(mask)[mask]
        m["value/mean"] = values
        m["value/explained_variance"] = 1 - (target - values).var(correction=0) / target.var(
            correction=0
        )
        m["residual/rms"] = (target - values).square().mean().sqrt()
    return finite({name: value.mean().item() for name, value in m.items()})


def correlation(x, y):
    """Pearson's, of two [N] tensors; nan where one is constant."""
    x, y = (t.double() - t.double().mean() for t in (x, y))
    return (x @ y) / (x.norm() * y.norm())


# ------------------------------------------------------------------------------------------------------------------ evaluation


def evaluate_task(
    c: Config, world: World, policy, reference, examples, tag: str, state=None, enumerated=None
):
    """Policy against reference, best of 8 and the optimum at the same KL, on `examples` (prompts never trained on).

    The optimum is taken over all responses where they can be enumerated (tiny), else over the samples drawn here.
    state: where DRO keeps its value network and the mean and deviation of the rewards.

    Returns: the metrics; for each prompt (prompt, policy responses, reference responses) as token ids; and what a picture
    shows: the frontier, and V of the prompts beside V*.
    """
    n, enumerated = c.eval_samples, bool(world.task.words) if enumerated is None else enumerated
    drawn = [
        sample_lists(c, world, m, examples, n, rng(c.seed, "evaluate", tag, who, device=c.device))
        for who, m in (("reference", reference), ("policy", policy))
    ]
    rewards = [
        torch.tensor(
            [rewarded(world, e.prompt, ys) for e, ys in zip(examples, lists)], dtype=torch.float64
        )
        for lists in drawn
    ]
    if enumerated:
        both = [enumerate_tiny(world)] * len(examples)
        pool_rewards = torch.tensor(
            [rewarded(world, e.prompt, ys) for e, ys in zip(examples, both)], dtype=torch.float64
        )
    else:
        both, pool_rewards = [r + p for r, p in zip(*drawn)], torch.cat(rewards, 1)
    pool = with_responses(examples, both)
    ref_logps, logps = (
        torch.tensor(score_examples(c, world, m, pool), dtype=torch.float64)
        for m in (reference, policy)
    )
    if enumerated:
        log_b, log_w = ref_logps, logps
        kls = dro.kl_divergence(logps, ref_logps)
    else:
        log_b, log_w = frontier.mixture_weights(logps - ref_logps)
        kls = (logps - ref_logps)[:, n:].mean(-1)  # [B], over the policy's own samples
    f = frontier.frontier(log_b, log_w, pool_rewards, seed=c.seed)
    curve = torch.stack(frontier.frontier_curve(log_b, pool_rewards), -1).mean(
        1
    )  # [G, 2], KL and reward
    picture = {
        "frontier": curve.tolist(),
        "policy": [f.kl, f.policy_reward],
        "reference": [0.0, f.reference_reward],
    }
    reference_rewards, policy_rewards = rewards
    wins = policy_rewards[:, :, None] - reference_rewards[:, None, :]
    kl, groups = (
        kls.mean().item(),
        reference_rewards[:, : n - n % 8].unflatten(1, (-1, 8)) if n >= 8 else None,
    )
    usable = (
        kl >= 0.05 and (enumerated or f.effective_sample_size >= 20) and math.isfinite(f.efficiency)
    )
    # How far the best achievable differs from prompt to prompt: V* at tau 1 in units of the reference's reward deviation
    deviation = ((log_b.exp() * (pool_rewards - f.reference_reward) ** 2).sum(-1).mean()) ** 0.5
    values = (
        dro.optimal_value(log_b, pool_rewards, deviation.item()) if deviation else torch.zeros(1)
    )
    m = {
        "policy_reward": policy_rewards.mean().item(),
        "reference_reward": reference_rewards.mean().item(),
        "best_of_8_reward": groups.max(-1).values.mean().item() if groups is not None else math.nan,
        "win_rate": ((wins > 0).double() + 0.5 * (wins == 0).double()).mean().item(),
        "kl": kl,
        "kl_se": standard_error(kls),
        "optimal_kl": f.optimal_kl,
        "optimal_reward": f.optimal_reward,
        "optimal_reward_se": f.optimal_reward_se,
        "effective_sample_size": f.effective_sample_size,
        "efficiency": f.efficiency if usable else math.nan,
        "efficiency_se": f.efficiency_se if usable else math.nan,
        "value_deviation": values.std(correction=0).item(),
        "reward_deviation": deviation.item(),
    }
    if c.objective in ("dro", "dro-p") and state and (state.statistics or c.reward_norm == "none"):
        found, picture_of_value = against_the_optimum(
            c, state, examples, log_b, log_w, normalised(state, pool_rewards)
        )
        m, picture = m | found, picture | picture_of_value
        if not enumerated:  # the weights say too little about every single response
            m.pop("kl_from_optimum")
    for who, lists, rs in (
        ("policy", drawn[1], policy_rewards),
        ("reference", drawn[0], reference_rewards),
    ):
        m[f"{who}_length"] = sum(len(y) for ys in lists for y in ys) / (len(lists) * n)
        m[f"{who}_distinct"] = sum(len({tuple(y) for y in ys}) for ys in lists) / (len(lists) * n)
        parts = [
            world.task.breakdown(e.prompt, text_of(world, y))
            for e, ys in zip(examples, lists)
            for y in ys
        ]
        m |= {f"{who}_{k}": sum(p[k] for p in parts) / len(parts) for k in parts[0]}
        # the same answers under another prompt: what is left of the gain does not come from reading the prompt
        others = examples[1:] + examples[:1]
        m[f"shuffled_{who}_reward"] = (
            sum(sum(rewarded(world, e.prompt, ys)) for e, ys in zip(others, lists)) / rs.numel()
        )
    return finite(m), list(zip(examples, drawn[1], drawn[0])), picture


def normalised(state, rewards):
    """Rewards as DRO sees them: minus the training rewards' mean, over their deviation."""
    mean, deviation = state.statistics or (0.0, 1.0)
    return (rewards - mean) / deviation


def against_the_optimum(c: Config, state, examples, log_b, log_w, rewards) -> tuple[dict, dict]:
    """pi* and V* at DRO's own tau beside policy and value network, over responses with log-probs log_b, log_w [B, N]."""
    values = dro.optimal_value(log_b, rewards, c.tau)
    optimum = dro.optimal_logps(log_b, rewards, c.tau)
    m = {"kl_from_optimum": dro.kl_divergence(optimum, log_w).mean().item()}  # KL(pi*, policy)
    m["optimum_kl"] = dro.kl_divergence(optimum, log_b).mean().item()  # KL(pi*, reference)
    if not state.value:
        return m, {}
    batch = data.make_batch(with_responses(examples, [[[0]]] * len(examples)), 0, c.device)
    with torch.no_grad(), precision(c):
        learned = batch_values(c, state, batch).double().cpu()
    m["value_error"] = (learned - values).abs().mean().item()
    m["value_correlation"] = correlation(learned, values).item()
    return m, {"value": learned.tolist(), "optimal_value": values.tolist()}


def finite(metrics: dict) -> dict:
    """nan and inf become None: metrics.json is plain JSON."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()
    }


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of [B] values; nan for a single one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def enumerate_tiny(world: World) -> list[list[int]]:
    """All 584 responses of tiny as token ids, EOS included."""
    words = [world.enc.encode_single_token(" " + w) for w in world.task.words]
    lists = (
        [[a] for a in words]
        + [[a, b] for a in words for b in words]
        + [[a, b, d] for a in words for b in words for d in words]
    )
    return [ids + [world.enc.eot_token] for ids in lists]


def evaluate_lists(c: Config, world: World, policy, reference) -> list[dict]:
    """Scores of every held-out list (two responses or more), a row each: does a score find the better response?

    The scores: sum of token log-probs, mean per token, log-ratio to the reference, and, beside them, the length in characters.
    """
    examples = [e for e in world.heldout if len(e.response_ids) > 1]
    rows = []
    for e, policy_logps, ref_logps in zip(
        examples,
        score_examples(c, world, policy, examples),
        score_examples(c, world, reference, examples),
    ):
        lengths = [len(ids) for ids in e.response_ids]
        rows.append(
            {
                "prompt": e.prompt,
                "rewards": e.rewards,
                "policy_sum": policy_logps,
                "policy_mean": [s / n for s, n in zip(policy_logps, lengths)],
                "policy_ratio": [s - r for s, r in zip(policy_logps, ref_logps)],
                "reference_sum": ref_logps,
                "reference_mean": [s / n for s, n in zip(ref_logps, lengths)],
                "longest": [len(text_of(world, ids)) for ids in e.response_ids],
            }
        )
    return rows


def list_outcome(scores, rewards) -> tuple[float, float, int]:
    """Of one list: reward of the top-scored response, pairs ordered rightly, pairs of unlike rewards.

    At a tie of scores the top reward is the mean of the tied, and a pair counts 1/2.

    >>> list_outcome([0.3, 0.1, 0.2], [5.0, 1.0, 1.0])
    (5.0, 2.0, 2)
    """
    pairs = [(i, j) for i in range(len(rewards)) for j in range(i) if rewards[i] != rewards[j]]
    right = sum(
        0.5
        if scores[i] == scores[j]
        else float((scores[i] > scores[j]) == (rewards[i] > rewards[j]))
        for i, j in pairs
    )
    top = [r for s, r in zip(scores, rewards) if s == max(scores)]
    return sum(top) / len(top), right, len(pairs)


def list_metrics(rows: list[dict]) -> dict:
    """top1_reward and pair_accuracy of every score over rows of `evaluate_lists`; mean_reward and best_reward are the range."""
    rewards = [row["rewards"] for row in rows]
    m = {
        "mean_reward": sum(sum(r) / len(r) for r in rewards) / len(rows),
        "best_reward": sum(map(max, rewards)) / len(rows),
    }
    for name in list(rows[0])[2:]:
        top, right, pairs = map(
            sum, zip(*(list_outcome(row[name], row["rewards"]) for row in rows))
        )
        m[f"top1_reward_{name}"], m[f"pair_accuracy_{name}"] = (
            top / len(rows),
            right / pairs if pairs else None,
        )
    m["longer_accuracy"] = m.pop("pair_accuracy_longest")
    return m


def sampled_kl(
    c: Config, world: World, policy, reference, examples, M: int, tag
) -> tuple[list, torch.Tensor]:
    """M policy samples a prompt and their log-ratios to the reference [B, M], whose mean estimates KL(pi || pi_ref)."""
    lists = sample_lists(c, world, policy, examples, M, rng(c.seed, "quick", tag, device=c.device))
    pool = with_responses(examples, lists)
    logps, ref_logps = (
        torch.tensor(score_examples(c, world, m, pool)) for m in (policy, reference)
    )
    return lists, logps - ref_logps


def quick_evaluation(c: Config, world: World, state, reference, step: int) -> dict:
    """Reward and KL of a few policy samples on held-out prompts: the live line and the curves.

    DRO's residual r - V - tau log pi/pi_ref is told on held-out prompts too, as its deviation within a prompt, where V cancels:
    a value network that has memorised its prompts hides a large one behind a small loss.
    """
    examples = world.heldout[:: max(1, len(world.heldout) // 32)][:32]
    lists, ratios = sampled_kl(c, world, state.policy, reference, examples, 8, step)
    m, rewards = {"kl": ratios.mean().item()}, None
    if world.task:
        rewards = torch.tensor([rewarded(world, e.prompt, ys) for e, ys in zip(examples, lists)])
        m["reward"] = rewards.mean().item()
    if c.objective in ("dro", "dro-p") and c.reward_norm in ("global", "none"):
        if world.task:
            variances = (normalised(state, rewards) - c.tau * ratios).var(-1, correction=0)  # [B]
        else:
            lists = [e for e in examples if len(e.response_ids) > 1]
            scored = zip(
                lists,
                *(score_examples(c, world, model, lists) for model in (state.policy, reference)),
            )
            residuals = [
                normalised(state, torch.tensor(e.rewards))
                - c.tau * (torch.tensor(logps) - torch.tensor(ref_logps))
                for e, logps, ref_logps in scored
            ]
            variances = (
                torch.stack([r.var(correction=0) for r in residuals])
                if residuals
                else torch.tensor(math.nan)
            )
        m["residual/within_prompt"] = variances.mean().sqrt().item()
    return finite(m)


# -------------------------------------------------------------------------------------------------------------------- the loop


def difference(old: dict, new: dict) -> str:
    """What differs between two flat dicts, in words; empty where nothing does."""
    return ", ".join(
        f"{k}: {old.get(k)!r} there, {new.get(k)!r} here"
        for k in {**old, **new}
        if old.get(k) != new.get(k)
    )


@dataclass
class State:
    """What the loop changes, and a checkpoint holds."""

    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    value: torch.nn.Module | None = None  # DRO's value network
    reference: str = ""  # digest of the reference's weights
    step: int = 0  # optimiser steps done
    evolve: int = 0  # the Evolve round that `generated` belongs to
    generated: list | None = (
        None  # [[ids, ...], ...] sampled in this round for every training prompt
    )
    statistics: list | None = (
        None  # mean and deviation of the training rewards, for --reward-norm global
    )


def new_state(c: Config, world: World, reference) -> State:
    """Policy and, for DRO, value network as the reference left them; an optimizer with a parameter group for each."""

    def copy():
        model = new_model(c, world)
        model.load_state_dict(reference.state_dict())
        return model

    policy, value = copy(), None
    groups = [{"params": list(policy.parameters()), "peak": c.lr}]
    if c.objective == "dro":
        value = models.ValueNetwork(policy if c.share_networks else copy()).to(c.device)
        if c.share_networks:
            groups[0]["params"] += value.value_head.parameters()
        else:
            groups.append(
                {
                    "params": list(value.parameters()),
                    "peak": c.lr if c.value_lr is None else c.value_lr,
                }
            )
    kind = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adafactor
    optimizer = kind(groups, lr=c.lr, weight_decay=c.weight_decay)
    return State(policy, optimizer, value, digest_of(reference.state_dict()))


def batch_values(c: Config, state: State, batch):
    """V(x) [B] of a batch's prompts; with --value batch their mean, for all of them alike."""
    values = state.value(batch.prompt_ids, batch.prompt_mask)
    return values.mean().expand_as(values) if c.value == "batch" else values


@torch.no_grad()
def mismatched_logps(world: World, policy, reference, batch) -> tuple:
    """KTO's mismatched pairs, prompt i with the first candidate of prompt i + 1: log-probs of policy and reference.

    Returns: two [K], K = B less the pairs whose two prompts are the same.
    """
    apart = (batch.prompt_ids != batch.prompt_ids.roll(-1, 0)).any(-1)  # [B]
    others = dataclasses.replace(
        batch,
        response_ids=batch.response_ids[:, :1].roll(-1, 0),
        response_mask=batch.response_mask[:, :1].roll(-1, 0),
    )
    return tuple(
        models.response_logps(m, others, world.allowed)[apart, 0] for m in (policy, reference)
    )


def run_settings(c: Config) -> dict:
    """The config without the two folders, which may move."""
    return {k: v for k, v in vars(c).items() if k not in ("out", "resume")}


def save_checkpoint(c: Config, state: State, parts: dict) -> None:
    """out/<run>/checkpoint.pt: all that is needed to go on to the same bits. `parts` tells sources and data apart."""
    fields = {name: getattr(state, name) for name in ("step", "evolve", "generated", "statistics")}
    fields["reference"] = state.reference
    weights = {"policy": state.policy.state_dict(), "optimizer": state.optimizer.state_dict()}
    if state.value:
        weights["value"] = state.value.state_dict()
    save(
        {**fields, **weights, "config": run_settings(c), "parts": parts},
        Path(c.out) / "checkpoint.pt",
    )


def load_checkpoint(c: Config, parts: dict) -> dict | None:
    """The checkpoint to go on from, or None before the first. Raises: ConfigError where it belongs to another run."""
    path = Path(c.out) / "checkpoint.pt"
    if not c.resume:
        return None
    if not path.exists():
        print(f"{c.resume} has no checkpoint yet: starting over")
        return None
    try:
        checkpoint = torch.load(path, map_location=c.device, weights_only=True)
    except Exception as e:  # damaged files fail in many ways
        raise ConfigError(
            f"--resume {c.resume}: {path} is damaged ({str(e).splitlines()[0][:80]})"
        ) from None
    if told := difference(checkpoint["config"], run_settings(c)):
        raise ConfigError(f"--resume {c.resume}: its checkpoint is of another config ({told})")
    if checkpoint["parts"]["texts"] != parts["texts"]:
        raise ConfigError(
            f"--resume {c.resume}: its data have changed since the checkpoint was written"
        )
    if told := difference(checkpoint["parts"], parts):
        print(f"note: the run goes on, but not bit by bit as it would have ({told})")
    print(f"going on from step {checkpoint['step']} of {c.steps}")
    return checkpoint


def restore(state: State, checkpoint: dict) -> None:
    """Put a checkpoint into the state."""
    state.policy.load_state_dict(checkpoint["policy"])
    if state.value:
        state.value.load_state_dict(checkpoint["value"])
    if checkpoint["step"]:
        state.optimizer.load_state_dict(checkpoint["optimizer"])
    for name in ("step", "evolve", "generated", "statistics"):
        setattr(state, name, checkpoint[name])


def draw_candidates(c: Config, world: World, state: State, reference, e: int, visits: int) -> list:
    """M responses to each training prompt that Evolve round e will visit, none to the others: from the policy as it is now,
    from the reference, or any (--behaviour)."""
    chosen = sorted(
        torch.randperm(len(world.train), generator=rng(c.seed, "prompts", e)).tolist()[:visits]
    )
    examples, generator = [world.train[i] for i in chosen], rng(c.seed, "pool", e, device=c.device)
    lists = [[]] * len(world.train)
    if c.behaviour == "uniform":
        responses = enumerate_tiny(world)
        rows = torch.randint(
            len(responses), (len(examples), c.candidates), generator=generator, device=c.device
        )
        drawn = [[responses[j] for j in row] for row in rows.tolist()]
    else:
        model = state.policy if c.behaviour == "policy" else reference
        drawn = sample_lists(
            c, world, model, examples, c.candidates, generator, c.sample_temperature
        )
    for i, candidates in zip(chosen, drawn):
        lists[i] = candidates
    return lists


def make_pool(
    c: Config, world: World, state: State, reference, examples: list, lists: list
) -> list:
    """Rewards and reference log-probs of every list that has candidates: the pool, as Examples."""
    began = time.time()
    pool = [
        dataclasses.replace(e, response_ids=ys, rewards=e.rewards[: len(ys)])
        for e, ys in zip(examples, lists)
        if ys
    ]
    if not pool:
        return []
    if c.objective in LISTS and (single := sum(len(e.response_ids) < 2 for e in pool)):
        pool = [e for e in pool if len(e.response_ids) > 1]
        print(
            f"{single} lists of a single response are left out: there is nothing to compare in them"
        )
    if world.task:
        for e in pool:
            e.rewards = rewarded(world, e.prompt, e.response_ids)
    if not state.step and c.objective in (
        "dro",
        "dro-p",
        "kto",
    ):  # a later pool may be of one reward, the first may not
        check_rewards(c, [r for e in pool for r in e.rewards])
    if c.reward_norm == "global":
        state.statistics = state.statistics or mean_and_deviation(
            [r for e in pool for r in e.rewards]
        )
        for e in pool:
            e.rewards = [normalised(state, r) for r in e.rewards]
    if c.shuffle_prompts:
        others = torch.randperm(len(pool), generator=rng(c.seed, "shuffle", state.evolve)).tolist()
        pool = [dataclasses.replace(e, prompt_ids=pool[i].prompt_ids) for e, i in zip(pool, others)]
    for e, logps in zip(pool, score_examples(c, world, reference, pool)):
        e.ref_logps = logps
    rewards = [r for e in pool for r in e.rewards]
    best = sum(max(e.rewards) for e in pool) / len(pool)
    print(
        f"pool: {len(pool)} lists of {len(rewards) / len(pool):.1f} responses, reward {sum(rewards) / len(rewards):.3f}, "
        f"best of a list {best:.3f} ({time.time() - began:.0f} s)"
    )
    return pool


def batches_from(c: Config, pool: list, e: int, n: int):
    """Batches of Evolve round e from its n-th on, epoch after epoch; their order depends on seed, round and epoch alone."""
    per_epoch = -(-len(pool) // c.batch_size)
    while True:
        order = data.batch_order(pool, c.batch_size, rng(c.seed, "order", e, n // per_epoch))
        for rows in order[n % per_epoch :]:
            yield [pool[j] for j in rows]
            n += 1


def train_policy(c: Config, world: World, state: State, reference, parts: dict) -> dict:
    """The loop: Evolve and Iterate (lire.self_enhance); inside them lr, batch, loss, step, log, evaluate, save.

    Returns: seconds spent on pools and on training. On Ctrl-C it saves and raises KeyboardInterrupt; on a non-finite loss it
    raises FloatingPointError and the last good checkpoint stays.
    """
    log_path, resumed = Path(c.out) / "log.jsonl", state.evolve if state.step else -1
    kept = (
        log_path.read_text().splitlines(keepends=True) if state.step and log_path.exists() else []
    )
    kept = [
        line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= state.step
    ]  # none half-written
    save("".join(kept), log_path)

    passes = max(c.evolve, 1) * c.iterate
    ends = [
        round(k * c.steps / passes) for k in range(passes + 1)
    ]  # pass k is the steps from ends[k] to ends[k + 1]
    examples = world.train if c.evolve else world.logged
    start = [
        [] if c.evolve else e.response_ids[: c.candidates] for e in examples
    ]  # the data's own responses

    def sample(e):
        if e < resumed:
            return [[]] * len(examples)  # this round was over before the checkpoint
        if (
            e > resumed
        ):  # else the run goes on inside round e, with the candidates of the checkpoint
            visits = -(
                -(ends[(e + 1) * c.iterate] - ends[e * c.iterate]) * c.batch_size // c.iterate
            )  # prompts a pass
            state.generated, state.evolve = (
                draw_candidates(c, world, state, reference, e, visits),
                e,
            )
        return state.generated

    def score(lists):
        return make_pool(c, world, state, reference, examples, lists)

    progress, latest, seconds, began = (
        Progress(c.objective, c.steps, state.step),
        {},
        {"pool": 0.0, "train": 0.0},
        time.time(),
    )
    with interruptible() as interrupted, open(log_path, "a") as log_file:
        for e, i, pool in lire.self_enhance(sample, score, c.evolve, c.iterate, start):
            seconds["pool"] += time.time() - began
            began = time.time()
            first, last = max(state.step, ends[e * c.iterate + i]), ends[e * c.iterate + i + 1]
            for step, chosen in zip(
                range(first + 1, last + 1), batches_from(c, pool, e, first - ends[e * c.iterate])
            ):
                batch = data.make_batch(chosen, world.enc.eot_token, c.device)
                values = mismatched = None
                with precision(c):
                    logps = models.response_logps(state.policy, batch, world.allowed)
                    if state.value:
                        values = batch_values(c, state, batch)
                    if c.objective == "kto":
                        mismatched = mismatched_logps(world, state.policy, reference, batch)
                losses = compute_loss(c, logps, batch, values, mismatched)
                loss = total(losses)
                norm, *value_norm = optimizer_step(state.optimizer, loss, step - 1, c.steps, c.clip)
                if not all(map(math.isfinite, (norm, *value_norm))):
                    raise FloatingPointError(
                        f"step {step}: loss is {loss.item()}, gradient norm {norm}; the last good checkpoint is kept in "
                        f"{c.out}; a smaller --lr may help"
                    )
                state.step = step
                due = step % c.eval_every == 0 or step == c.steps
                if due:
                    latest = quick_evaluation(c, world, state, reference, step)
                if due or step == 1 or step % 10 == 0:
                    lr = state.optimizer.param_groups[0]["lr"]
                    row = {
                        "step": step,
                        "evolve": e,
                        "loss": loss.item(),
                        "learning_rate": lr,
                        "grad_norm": norm,
                    }
                    row |= {"value/grad_norm": value_norm[0]} if value_norm else {}
                    row |= batch_metrics(c, logps, batch, losses, values) | (latest if due else {})
                    log_file.write(json.dumps(row) + "\n")
                    log_file.flush()
                    if due and row.get("candidates/collapsed", 0) > 0.9:
                        print(
                            f"step {step}: the listwise softmax has collapsed: one candidate holds over 99 % in "
                            f"{row['candidates/collapsed']:.0%} of the lists; try a higher --temperature or --score mean"
                        )
                shown = "  ".join(
                    f"{k} {v:.2f}" for k, v in sorted(latest.items(), reverse=True) if v is not None
                )
                progress.show(step, f"loss {loss.item():.4f}  {shown}", line=due)
                if due or interrupted:
                    save_checkpoint(c, state, parts)
                if interrupted:
                    raise KeyboardInterrupt(
                        f"saved after step {step}; `python train.py --resume {c.out}` goes on"
                    )
            seconds["train"] += time.time() - began
            began = time.time()
    return seconds


def mean_and_deviation(values) -> list[float]:
    """Mean and standard deviation of the training rewards. Raises: ConfigError where they are constant."""
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    if max(values) == min(values):
        raise ConfigError(f"every reward is {mean}: there is nothing to learn")
    return [mean, deviation]


@contextlib.contextmanager
def interruptible():
    """Ctrl-C inside asks the loop to stop after the step it is in (the list becomes non-empty); a second one stops at once."""
    asked = []

    def ask(signum, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        print(
            "\nstopping after the next step; Ctrl-C again stops at once and loses the steps since the last checkpoint"
        )

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def side_by_side(world: World, answers, n: int = 3, rows: int = 3) -> str:
    """The first n prompts with reference and policy answers, rewards before them where there is a task."""
    lines = []
    for example, policy_lists, reference_lists in answers[:: max(1, len(answers) // n)][:n]:
        lines.append(example.prompt)
        for who, lists in (("reference", reference_lists), ("policy", policy_lists)):
            for ids in lists[:rows]:
                text = text_of(world, ids).strip()
                reward = f"{world.task.reward(example.prompt, text):6.2f}" if world.task else ""
                lines.append(f"  {who:9} {reward}  {text}")
    return "\n".join(lines)


def print_table(pairs, columns: int = 3) -> None:
    """name value, name value, ... in columns."""
    cells = [f"{name:20} {value!s:15}" for name, value in pairs]
    rows = -(-len(cells) // columns)
    for i in range(rows):
        print("  ".join(cells[i::rows]).rstrip())


def evaluate(c: Config, world: World, state: State, reference) -> tuple[dict, list]:
    """The metrics of a finished run and its answers to held-out prompts (prompt, policy's, reference's responses).

    Leaves the frontier of a task in frontier.json, the scores of the held-out lists of a file in heldout.jsonl.
    """
    policy, out = state.policy.eval(), Path(c.out)
    choose = lambda examples: random.Random(0).sample(examples, min(c.eval_prompts, len(examples)))
    heldout = choose(world.heldout)
    if world.task:
        metrics, answers, picture = evaluate_task(
            c, world, policy, reference, heldout, "heldout", state
        )
        save(json.dumps(picture), out / "frontier.json")
        splits = {
            "ood": world.ood,
            "train": world.train if world.task.words else [],
        }  # tiny: is what it learnt exact?
        for split, examples in splits.items():
            if examples:
                found = evaluate_task(c, world, policy, reference, choose(examples), split, state)[
                    0
                ]
                metrics |= {f"{split}_{k}": v for k, v in found.items()}
        return finite(metrics), answers
    rows = evaluate_lists(c, world, policy, reference)
    save("".join(json.dumps(row) + "\n" for row in rows), out / "heldout.jsonl")
    if not rows:
        print("the held-out lists have a single response each: no list metrics")
    lists, ratios = sampled_kl(c, world, policy, reference, heldout, 8, "final")
    base = sample_lists(c, world, reference, heldout, 8, rng(c.seed, "final", device=c.device))
    kls = ratios.mean(-1)  # [B]
    metrics = {"kl": kls.mean().item(), "kl_se": standard_error(kls)} | {
        f"{who}_length": sum(len(y) for ys in ls for y in ys) / ratios.numel()
        for who, ls in (("policy", lists), ("reference", base))
    }
    return finite((list_metrics(rows) if rows else {}) | metrics), list(zip(heldout, lists, base))


def main(config: Config) -> dict:
    """One whole run; see the top of this file. Returns the metrics, which are also in out/<run>/metrics.json.

    Raises: ConfigError, data.DataError with one line for the user, before anything is written, but for a task whose
    first pool has nothing to learn; FloatingPointError where training left the finite numbers (the last good checkpoint is kept).
    """
    from experiments import figures  # pictures are drawn from the files of a run, not by it

    began = time.time()
    c = resolve(config)
    try_objective(c)
    if c.device == "cpu":
        # A saturated softmax sends subnormal numbers back through the network, and a CPU multiplies those a hundred times slower.
        torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")
    out = Path(c.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, expected a folder")
    if not c.resume and (out / "config.json").exists():
        raise ConfigError(
            f"--out {out} holds a run already: go on with --resume {out}, or choose another folder"
        )
    world = make_world(c)
    parts = reference_parts(c, world)
    checkpoint = load_checkpoint(c, parts)
    print_table([(k, v) for k, v in vars(c).items() if v not in ("", [], None)])
    out.mkdir(parents=True, exist_ok=True)
    save(json.dumps(vars(c), indent=1), out / "config.json")
    if world.ranks:
        data.save_ranks(world.ranks, out / "tokenizer.txt")

    seconds = {"setup": time.time() - began}
    began = time.time()
    reference = get_reference(c, world, checkpoint)
    save(reference.state_dict(), out / "reference.pt")
    state = new_state(c, world, reference)
    if c.compile:
        state.policy.hidden = torch.compile(state.policy.hidden, dynamic=True)
    seconds["reference"] = time.time() - began
    if checkpoint:
        restore(state, checkpoint)
    if c.objective == "sft" or not c.steps:
        save_checkpoint(c, state, parts)  # the policy is the reference
    else:
        seconds |= train_policy(c, world, state, reference, parts)

    began = time.time()
    metrics, answers = evaluate(c, world, state, reference)
    seconds["evaluate"] = time.time() - began
    metrics |= {f"seconds_{k}": round(v, 1) for k, v in seconds.items()}
    kilobyte = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes
    metrics["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kilobyte)
    save(json.dumps(metrics, indent=1), out / "metrics.json")
    save(side_by_side(world, answers, 10, 4) + "\n", out / "samples.txt")

    print("\n" + side_by_side(world, answers) + "\n")
    print_table(
        [
            (k, "-" if v is None else f"{v:.3f}" if isinstance(v, float) else v)
            for k, v in metrics.items()
        ]
    )
    if c.objective != "sft" and c.steps:
        print(figures.draw(out))
    print(f"written to {out}/")
    return metrics


def command_line(argv=None) -> Config:
    """Config from the options; --resume takes the settings of its run, and refuses options that say otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = lambda message: sys.exit(f"train.py: {message}; --help lists the options")
    for f in dataclasses.fields(Config):
        kind = (
            next((t for t in typing.get_args(f.type) if t is not types.NoneType), f.type)
            if isinstance(f.type, types.UnionType)
            else f.type
        )
        how = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"nargs": "+", "action": "extend", "type": str}
            if typing.get_origin(kind) is list
            else {"type": kind}
        )
        shown = "" if f.default in (dataclasses.MISSING, None, "") else f" (default {f.default})"
        if best := [
            f"{objective} {of[f.name]:g}" for objective, of in BEST.items() if f.name in of
        ]:
            shown = f" (default: {', '.join(best)})"
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            help=(f.metadata["help"] + shown).replace("%", "%%"),
            **how,
        )
    given = vars(parser.parse_args(argv))
    if "data" in given and "task" in given:
        raise ConfigError("--task makes the data and --data reads them: give one of the two")
    if "resume" in given:
        run = given.pop("resume")
        path = Path(run) / "config.json"
        if not path.exists():
            raise ConfigError(
                f"--resume {run}: no config.json in it, expected the folder of a run, such as out/lire-dialogue-0"
            )
        if not (saved := read_json(path)):
            raise ConfigError(
                f"--resume {run}: {path} is damaged, expected the settings of the run as JSON"
            )
        if unknown := set(saved) - {f.name for f in dataclasses.fields(Config)}:
            raise ConfigError(
                f"--resume {run}: its config.json is of another version (it has {', '.join(sorted(unknown))})"
            )
        if given.get("device") == "auto":
            del given["device"]  # the run has chosen one
        if "out" in given:
            raise ConfigError("--resume goes on in the folder of its run: leave --out away")
        if told := difference({k: saved.get(k) for k in given}, given):
            raise ConfigError(
                f"--resume {run}: that run has another config ({told}); leave these options out, or start a new run"
            )
        given = saved | {"resume": run, "out": run}
    return Config(**given)


if __name__ == "__main__":
    sys.stdout.reconfigure(
        errors="replace"
    )  # whatever a model says, the terminal can show something
    try:
        main(command_line())
    except (ConfigError, data.DataError, FloatingPointError, OSError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt as e:
        sys.exit(
            f"\ninterrupted: {e or 'python train.py --resume RUN goes on from the last checkpoint of the folder in out/, if it has one'}"
        )
