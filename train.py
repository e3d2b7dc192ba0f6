"""Align a small language model offline, and measure it against the exact optimum.

    python train.py --objective lire                                    the main job: synthetic dialogue, about 90 s on two cores
    python train.py --objective lire --task summary --seed 1            another task, another seed
    python train.py --objective lire --data lists.jsonl --score mean    your own preference lists

A run makes the data, trains (or finds) the reference model, samples and scores a pool of M candidates a prompt, trains the
policy on it, evaluates it on prompts never trained on, and writes out/<run>/. `main(config)` returns the metrics.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
import dro
import lire
import model as models


@dataclass
class Config:
    """Everything a run depends on. Every field is an option of the command line: `sft_weight` is --sft-weight."""

    objective: str = "lire"  # lire, or sft: train and save the reference alone
    task: str = "dialogue"  # synthetic task: dialogue, summary or tiny
    data: list[str] = field(default_factory=list)  # files of preference lists instead of a task (.jsonl, .jsonl.gz)
    eval_data: list[str] = field(default_factory=list)  # held-out lists; without it 10 % of the prompts of --data
    limit: int = 0  # use the first so many lists of --data, 0 for all
    max_prompt: int = 256  # tokens of a prompt, a longer one loses its beginning
    max_response: int = 128  # tokens of a response, a longer one loses its end
    model: str = "gpt"  # gpt
    layers: int = 2  # of the model
    heads: int = 4  # of each layer
    width: int = 128  # of the model
    tokenizer: str = "bpe"  # bpe: trained on the run's own text; gpt2: tiktoken's
    vocab_size: int | None = None  # of bpe; default 512 for tasks, 1024 for files
    reference_steps: int | None = None  # SFT steps of the reference; default 600 for tasks, 300 for files
    reference_lr: float = 4e-3  # its peak learning rate
    candidates: int = 8  # M, responses sampled for each prompt
    sample_temperature: float = 1.0  # of the pool alone; evaluation samples at 1
    evolve: int | None = None  # Evolve rounds, each with a new pool; default 5 for tasks, 0 for files
    iterate: int = 1  # Iterate passes over the pool of a round
    temperature: float = 2.0  # LIRE's T
    score: str = "sum"  # sum or mean of the token log-probs, the score that LIRE compares
    reward_norm: str | None = None  # softmax, list-zscore, global or none; default softmax for lire
    sft_weight: float = 0.1  # weight of the SFT term on the best candidate
    shuffle_prompts: bool = False  # control: train every list under another prompt
    steps: int = 400  # optimiser steps in all, over all rounds
    batch_size: int = 16  # B, prompts a step
    lr: float = 5e-4  # peak learning rate, warm-up 3 %, then linear to 0
    weight_decay: float = 0.0  # AdamW's
    clip: float = 1.0  # gradient norm
    eval_prompts: int = 64  # prompts of each evaluation split
    eval_samples: int = 64  # responses a prompt from the policy and as many from the reference
    eval_every: int = 50  # steps between quick evaluations and checkpoints
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "float32"  # float32 or bfloat16 (autocast; weights stay float32)
    compile: bool = False  # torch.compile the model: pays on long runs
    out: str = ""  # folder of the run; default out/<objective>-<task>-<seed>
    resume: str = ""  # go on with this run


class ConfigError(ValueError):
    """A setting is impossible; the message is one line for the person who set it."""


CHOICES = {
    "task": ("dialogue", "summary", "tiny"),
    "model": ("gpt",),
    "tokenizer": ("bpe", "gpt2"),
    "score": ("sum", "mean"),
    "reward_norm": ("softmax", "list-zscore", "global", "none"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
}
POSITIVE = (
    "layers heads width max_prompt max_response candidates iterate batch_size lr reference_lr temperature sample_temperature "
    "clip eval_prompts eval_samples eval_every"
).split()


def resolve(config: Config) -> Config:
    """Fill in the defaults that depend on other settings, and refuse impossible values with one line."""
    c, files = dataclasses.replace(config), bool(config.data)
    c.vocab_size = c.vocab_size if c.vocab_size is not None else 1024 if files else 512
    c.reference_steps = c.reference_steps if c.reference_steps is not None else 300 if files else 600
    c.evolve = c.evolve if c.evolve is not None else 0 if files else 5
    c.reward_norm = c.reward_norm or ("softmax" if c.objective == "lire" else "none")
    for name, choices in CHOICES.items():
        if getattr(c, name) not in choices:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(c, name)!r}: choose from {', '.join(choices)}")
    for name, value in vars(c).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} must be finite, got {value}")
        if name in POSITIVE and not value > 0:
            raise ConfigError(f"{flag} must be positive, got {value}")
        if isinstance(value, (int, float)) and value < 0:
            raise ConfigError(f"{flag} must not be negative, got {value}")
    if c.width % c.heads:
        raise ConfigError(f"--width {c.width} is not a multiple of --heads {c.heads}")
    if c.vocab_size < 257:
        raise ConfigError(f"--vocab-size must be at least 257 (256 bytes and EOS), got {c.vocab_size}")
    if files and c.evolve:
        raise ConfigError(
            f"--evolve {c.evolve} samples and scores new responses, but a file has no reward function: leave it at 0"
        )
    if not files and not c.evolve:
        raise ConfigError("--evolve 0 trains on the responses of a file: give one with --data, or evolve at least once")
    if c.eval_data and not files:
        raise ConfigError("--eval-data goes with --data")
    if c.objective == "lire" and not files and c.candidates < 2:
        raise ConfigError(
            f"--objective lire compares the candidates of a list: --candidates must be at least 2, got {c.candidates}"
        )
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA GPU")
    if c.device == "auto":
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    c.out = (
        c.out
        or c.resume
        or free_folder(f"{c.objective}-{Path(c.data[0]).name.split('.')[0] if files else c.task}-{c.seed}")
    )
    return c


def free_folder(name: str) -> str:
    """out/<name>, or out/<name>-2 and so on where that holds a run already."""
    folders = [Path("out") / name] + [Path("out") / f"{name}-{k}" for k in range(2, 10_000)]
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


def digest_of(state: dict) -> str:
    """sha256 over the names and bytes of a state dict."""
    h = hashlib.sha256()
    for name, tensor in state.items():
        h.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
    ranks: dict | None  # its ranks, None for gpt2
    task: data.Task | None
    logged: list  # Examples the reference is trained on; for files also the pool
    heldout: list  # Examples: held-out lists of a file, or prompts of a task
    ood: list  # Examples: prompts about subjects never trained on
    train: list  # Examples: training prompts of a task
    allowed: torch.Tensor | None  # [max_response, V], tiny alone
    max_response: int
    fingerprint: str  # sha256 over all texts and rewards


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
        if c.objective == "lire" and all(len(r["responses"]) < 2 for r in records):
            raise ConfigError(
                "--objective lire compares the candidates of a list, and every list here has a single response: it can't learn"
            )
    else:
        task = data.make_task(c.task, random.Random(c.seed))
        records = task.logged
    ranks = None
    if c.tokenizer == "gpt2":
        enc = data.gpt2_encoding()
    else:
        texts = (t for r in records for t in [r["prompt"], *(" " + y for y in r["responses"])])
        ranks = data.tiny_ranks() if c.task == "tiny" and task else data.train_bpe(texts, c.vocab_size)
        enc = data.encoding(ranks)
    if task and task.words and ranks is None:
        raise ConfigError("--task tiny has its own fixed vocabulary: leave --tokenizer at bpe")
    if task and task.words and c.max_response < task.max_response:
        raise ConfigError(f"--task tiny needs --max-response {task.max_response}, got {c.max_response}")
    if c.data and c.reward_norm == "global":
        mean_and_deviation([x for r in records for x in r["rewards"]])  # refuses a constant reward
    tokens = lambda records, say=lambda line: None: data.tokenize(records, enc, c.max_prompt, c.max_response, say)
    prompts = lambda split: tokens([{"prompt": p, "responses": [], "rewards": []} for p in task.prompts[split]])
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


def new_model(c: Config, world: World):
    """A model of the configured size with fresh weights, drawn from the seed alone."""
    size = models.GPTConfig(
        world.enc.n_vocab, c.max_prompt + c.max_response, c.layers, c.heads, c.width, world.enc.eot_token
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        return models.GPT(size).to(c.device)


def lr_at(step: int, steps: int, peak: float) -> float:
    """Warm-up over the first 3 % of the steps, then a straight line to 0."""
    warm = max(1, round(0.03 * steps))
    return peak * min((step + 1) / warm, (steps - step) / max(steps - warm, 1))


def optimizer_step(optimizer, parameters, loss, lr: float, clip: float) -> float:
    """Backward, clip, step. Returns the gradient norm before clipping; nothing is changed where it is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return norm


def train_reference(c: Config, world: World):
    """SFT on the logged responses, good and bad alike: mean negative log-likelihood per token."""
    model = new_model(c, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.reference_lr, weight_decay=0.01)
    progress, batches = Progress("reference", c.reference_steps), []
    epoch = 0
    for step in range(c.reference_steps):
        if not batches:
            batches, epoch = data.batch_order(world.logged, c.batch_size, rng(c.seed, "reference", epoch)), epoch + 1
        batch = data.make_batch([world.logged[i] for i in batches.pop()], world.enc.eot_token, c.device)
        with precision(c):
            logps = models.response_logps(model, batch, world.allowed)
        loss = -logps.sum() / batch.response_mask.sum()
        norm = optimizer_step(optimizer, model.parameters(), loss, lr_at(step, c.reference_steps, c.reference_lr), 1.0)
        if not math.isfinite(norm):
            raise FloatingPointError(f"reference step {step}: loss is {loss.item()}; a smaller --reference-lr may help")
        progress.show(step + 1, f"loss {loss.item():.3f}", line=(step + 1) % 200 == 0 or step + 1 == c.reference_steps)
    return model


REFERENCE_SETTINGS = "max_prompt max_response model layers heads width tokenizer vocab_size reference_steps reference_lr batch_size".split()


def reference_parts(c: Config, world: World) -> dict[str, str]:
    """All that the reference depends on, one hash or value each: its cache key."""
    code = "".join(
        map(inspect.getsource, (train_reference, optimizer_step, lr_at, new_model, rng, make_world, precision))
    )
    sources = {
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
    return parts | {f"--{name.replace('_', '-')}": str(getattr(c, name)) for name in REFERENCE_SETTINGS}


def get_reference(c: Config, world: World, checkpoint: dict | None = None):
    """The reference model: the run's own where it is resumed, else from the cache beside the run, else trained and cached.

    What is read is verified by its digest. Raises: ConfigError where a resumed run's reference is damaged and not in the cache.
    """
    if checkpoint:
        model, path = new_model(c, world), Path(c.out) / "reference.pt"
        with contextlib.suppress(Exception):  # a damaged file fails in many ways; the digest decides
            model.load_state_dict(torch.load(path, map_location=c.device, weights_only=True))
        if digest_of(model.state_dict()) != checkpoint["reference"]:
            raise ConfigError(f"--resume {c.resume}: {path} is damaged or not the reference that this run began with")
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
        except Exception as e:  # damaged files fail in many ways, and all of them mean: train it again
            print(f"reference: {path} is damaged ({str(e).splitlines()[0][:80]}), training it again")
    elif others := sorted(folder.glob("*.json")):
        told = [json.loads(other.read_text()) for other in others]
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
    return max(1, int((3e6 if c.device == "cpu" else 1e8) / (M * world.max_response * world.enc.n_vocab)))


def sample_lists(c: Config, world: World, model, examples, M: int, generator, temperature: float = 1.0) -> list:
    """M sampled responses for the prompt of every example, as token ids: [[ids, ...], ...]."""
    lists = []
    size = max(1, 512 // M)
    for start in range(0, len(examples), size):
        batch = data.make_batch(
            [
                dataclasses.replace(e, response_ids=[[0]], rewards=[0.0], ref_logps=None)
                for e in examples[start : start + size]
            ],
            world.enc.eot_token,
            c.device,
        )
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


def compute_loss(c: Config, logps, batch):
    """The objective: log-probs [B, M] of a batch to a loss [B] (or a scalar). The one place that knows the objectives."""
    mask, lengths = batch.candidate_mask, batch.response_mask.sum(-1)
    rewards = lire.transform_rewards(
        batch.rewards, mask, {"list-zscore": "zscore", "global": "none"}.get(c.reward_norm, c.reward_norm)
    )
    if c.objective == "lire":
        scores = logps / lengths.clamp_min(1) if c.score == "mean" else logps
        loss = lire.lire_loss(scores, rewards, mask, c.temperature)
        return loss + c.sft_weight * lire.sft_loss(logps, lengths, batch.rewards, mask) if c.sft_weight else loss
    if c.objective == "sft":  # the reference is all there is to train
        return -logps.sum(-1) / lengths.sum(-1)
    raise ConfigError(f"--objective {c.objective!r} is unknown: compute_loss in train.py knows lire and sft")


def try_objective(c: Config) -> None:
    """Run compute_loss once on made-up numbers, so that a wrong name or a bug in a new loss shows before the work begins."""
    generator, ids = torch.Generator().manual_seed(0), torch.ones(2, 3, 4, dtype=torch.long)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    response_mask = mask[..., None].expand(2, 3, 4)
    rewards, logps = torch.rand(2, 3, generator=generator), torch.randn(2, 3, generator=generator).requires_grad_()
    batch = data.Batch(ids[:, 0], ids[:, 0].bool(), ids, response_mask, mask, rewards, logps.detach())
    compute_loss(c, logps, batch).mean().backward()


@torch.no_grad()
def batch_metrics(c: Config, logps, batch) -> dict:
    """What is logged of a step: the names TRL uses where the meaning is the same. Best and worst candidate for chosen, rejected."""
    mask, lengths = batch.candidate_mask, batch.response_mask.sum(-1)
    P = lire.candidate_probs(logps / lengths.clamp_min(1) if c.score == "mean" else logps, mask, c.temperature)
    best = batch.rewards.masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
    worst = batch.rewards.masked_fill(~mask, torch.inf).argmin(-1, keepdim=True)
    ratios = logps - batch.ref_logps
    chosen, rejected = ratios.gather(-1, best), ratios.gather(-1, worst)
    n = mask.sum(-1)
    entropy = -torch.where(P > 0, P * P.clamp_min(1e-30).log(), 0.0).sum(-1)
    metrics = {
        "rewards/expected": (P * batch.rewards).sum(-1),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": logps.gather(-1, best),
        "logps/rejected": logps.gather(-1, worst),
        "candidates/entropy": entropy,
        "candidates/max_prob": P.max(-1).values,
        "candidates/collapsed": ((P.max(-1).values > 0.99) & (n > 1)).float(),
    }
    return {name: value.mean().item() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------------ evaluation


def evaluate_task(c: Config, world: World, policy, reference, examples, tag: str, enumerated=None) -> tuple[dict, list]:
    """Policy against reference, best of 8 and the optimum at the same KL, on `examples` (prompts never trained on).

    The optimum is taken over all responses where they can be enumerated (tiny), else over the samples drawn here.

    Returns: the metrics, and for each prompt (prompt, policy responses, reference responses) as token ids.
    """
    n, enumerated = c.eval_samples, bool(world.task.words) if enumerated is None else enumerated
    drawn = [
        sample_lists(c, world, m, examples, n, rng(c.seed, "evaluate", tag, who, device=c.device))
        for who, m in (("reference", reference), ("policy", policy))
    ]
    rewards = [
        torch.tensor([rewarded(world, e.prompt, ys) for e, ys in zip(examples, lists)], dtype=torch.float64)
        for lists in drawn
    ]
    if enumerated:
        both = [enumerate_tiny(world)] * len(examples)
        pool_rewards = torch.tensor(
            [rewarded(world, e.prompt, ys) for e, ys in zip(examples, both)], dtype=torch.float64
        )
    else:
        both, pool_rewards = [r + p for r, p in zip(*drawn)], torch.cat(rewards, 1)
    pool = [
        dataclasses.replace(e, response_ids=ys, rewards=[0.0] * len(ys), ref_logps=None)
        for e, ys in zip(examples, both)
    ]
    ref_logps, logps = (
        torch.tensor(score_examples(c, world, m, pool), dtype=torch.float64) for m in (reference, policy)
    )
    if enumerated:
        log_b, log_w = ref_logps, logps
        kls = dro.kl_divergence(logps, ref_logps)
    else:
        log_b, log_w = dro.mixture_weights(logps - ref_logps)
        kls = (logps - ref_logps)[:, n:].mean(-1)  # [B], over the policy's own samples
    f = dro.frontier(log_b, log_w, pool_rewards, seed=c.seed)
    reference_rewards, policy_rewards = rewards
    wins = policy_rewards[:, :, None] - reference_rewards[:, None, :]
    kl, groups = kls.mean().item(), reference_rewards[:, : n - n % 8].unflatten(1, (-1, 8)) if n >= 8 else None
    usable = kl >= 0.05 and (enumerated or f.effective_sample_size >= 20) and math.isfinite(f.efficiency)
    # How far the best achievable differs from prompt to prompt: V* at tau 1 in units of the reference's reward deviation
    deviation = ((log_b.exp() * (pool_rewards - f.reference_reward) ** 2).sum(-1).mean()) ** 0.5
    values = dro.optimal_value(log_b, pool_rewards, deviation.item())
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
    for who, lists, rs in (("policy", drawn[1], policy_rewards), ("reference", drawn[0], reference_rewards)):
        m[f"{who}_length"] = sum(len(y) for ys in lists for y in ys) / (len(lists) * n)
        m[f"{who}_distinct"] = sum(len({tuple(y) for y in ys}) for ys in lists) / (len(lists) * n)
        parts = [world.task.parts(e.prompt, text_of(world, y)) for e, ys in zip(examples, lists) for y in ys]
        m |= {f"{who}_{k}": sum(p[k] for p in parts) / len(parts) for k in parts[0]}
        # the same answers under another prompt: what is left of the gain does not come from reading the prompt
        others = examples[1:] + examples[:1]
        m[f"shuffled_{who}_reward"] = (
            sum(sum(rewarded(world, e.prompt, ys)) for e, ys in zip(others, lists)) / rs.numel()
        )
    return finite(m), list(zip(examples, drawn[1], drawn[0]))


def finite(metrics: dict) -> dict:
    """nan and inf become None: metrics.json is plain JSON."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


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
        examples, score_examples(c, world, policy, examples), score_examples(c, world, reference, examples)
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
        0.5 if scores[i] == scores[j] else float((scores[i] > scores[j]) == (rewards[i] > rewards[j])) for i, j in pairs
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
        top, right, pairs = map(sum, zip(*(list_outcome(row[name], row["rewards"]) for row in rows)))
        m[f"top1_reward_{name}"], m[f"pair_accuracy_{name}"] = top / len(rows), right / pairs if pairs else None
    m["longer_accuracy"] = m.pop("pair_accuracy_longest")
    return m


def sampled_kl(c: Config, world: World, policy, reference, examples, M: int, tag) -> tuple[list, torch.Tensor]:
    """M policy samples a prompt and their log-ratios to the reference [B, M], whose mean estimates KL(pi || pi_ref)."""
    lists = sample_lists(c, world, policy, examples, M, rng(c.seed, "quick", tag, device=c.device))
    pool = [
        dataclasses.replace(e, response_ids=ys, rewards=[0.0] * M, ref_logps=None) for e, ys in zip(examples, lists)
    ]
    logps, ref_logps = (torch.tensor(score_examples(c, world, m, pool)) for m in (policy, reference))
    return lists, logps - ref_logps


def quick_evaluation(c: Config, world: World, policy, reference, step: int) -> dict:
    """Reward and KL of a few policy samples on held-out prompts: the live line and the curves."""
    examples = world.heldout[:: max(1, len(world.heldout) // 32)][:32]
    lists, ratios = sampled_kl(c, world, policy, reference, examples, 8, step)
    m = {"kl": ratios.mean().item()}
    if world.task:
        m["reward"] = sum(sum(rewarded(world, e.prompt, ys)) for e, ys in zip(examples, lists)) / ratios.numel()
    return m


# -------------------------------------------------------------------------------------------------------------------- the loop


def difference(old: dict, new: dict) -> str:
    """What differs between two flat dicts, in words; empty where nothing does."""
    return ", ".join(
        f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in {**old, **new} if old.get(k) != new.get(k)
    )


@dataclass
class State:
    """What the loop changes, and a checkpoint holds."""

    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    reference: str = ""  # digest of the reference's weights
    step: int = 0  # optimiser steps done
    evolve: int = 0  # the Evolve round that `generated` belongs to
    generated: list | None = None  # [[ids, ...], ...] sampled in this round for every training prompt
    statistics: list | None = None  # mean and deviation of the rewards, for --reward-norm global


def run_settings(c: Config) -> dict:
    """The config without the two folders, which may move."""
    return {k: v for k, v in vars(c).items() if k not in ("out", "resume")}


def save_checkpoint(c: Config, state: State, parts: dict) -> None:
    """out/<run>/checkpoint.pt: all that is needed to go on to the same bits. `parts` tells sources and data apart."""
    fields = {name: getattr(state, name) for name in ("step", "evolve", "generated", "statistics")}
    fields["reference"] = state.reference
    weights = {"policy": state.policy.state_dict(), "optimizer": state.optimizer.state_dict()}
    save({**fields, **weights, "config": run_settings(c), "parts": parts}, Path(c.out) / "checkpoint.pt")


def load_checkpoint(c: Config, parts: dict) -> dict | None:
    """The checkpoint to go on from, or None before the first. Raises: ConfigError where it belongs to another run."""
    path = Path(c.out) / "checkpoint.pt"
    if not c.resume:
        return None
    if not path.exists():
        print(f"{c.resume} has no checkpoint yet: starting over")
        return None
    checkpoint = torch.load(path, map_location=c.device, weights_only=True)
    if told := difference(checkpoint["config"], run_settings(c)):
        raise ConfigError(f"--resume {c.resume}: its checkpoint is of another config ({told})")
    if checkpoint["parts"]["texts"] != parts["texts"]:
        raise ConfigError(f"--resume {c.resume}: its data have changed since the checkpoint was written")
    if told := difference(checkpoint["parts"], parts):
        print(f"note: the run goes on, but not bit by bit as it would have ({told})")
    print(f"going on from step {checkpoint['step']} of {c.steps}")
    return checkpoint


def restore(state: State, checkpoint: dict) -> None:
    """Put a checkpoint into the state."""
    state.policy.load_state_dict(checkpoint["policy"])
    if checkpoint["step"]:
        state.optimizer.load_state_dict(checkpoint["optimizer"])
    for name in ("step", "evolve", "generated", "statistics"):
        setattr(state, name, checkpoint[name])


def draw_candidates(c: Config, world: World, state: State, e: int, visits: int) -> list:
    """M responses from the policy as it is now to each training prompt that Evolve round e will visit, none to the others."""
    chosen = sorted(torch.randperm(len(world.train), generator=rng(c.seed, "prompts", e)).tolist()[:visits])
    examples, generator = [world.train[i] for i in chosen], rng(c.seed, "pool", e, device=c.device)
    lists = [[]] * len(world.train)
    drawn = sample_lists(c, world, state.policy, examples, c.candidates, generator, c.sample_temperature)
    for i, candidates in zip(chosen, drawn):
        lists[i] = candidates
    return lists


def make_pool(c: Config, world: World, state: State, reference, examples: list, lists: list) -> list:
    """Rewards and reference log-probs of every list that has candidates: the pool, as Examples."""
    began = time.time()
    pool = [dataclasses.replace(e, response_ids=ys) for e, ys in zip(examples, lists) if ys]
    if not pool:
        return []
    if c.objective == "lire" and (single := sum(len(e.response_ids) < 2 for e in pool)):
        pool = [e for e in pool if len(e.response_ids) > 1]
        print(f"{single} lists of a single response are left out: there is nothing to compare in them")
    if world.task:
        for e in pool:
            e.rewards = rewarded(world, e.prompt, e.response_ids)
    if c.reward_norm == "global":
        state.statistics = state.statistics or mean_and_deviation([r for e in pool for r in e.rewards])
        mean, deviation = state.statistics
        for e in pool:
            e.rewards = [(r - mean) / deviation for r in e.rewards]
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
    kept = log_path.read_text().splitlines(keepends=True) if state.step and log_path.exists() else []
    kept = [
        line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= state.step
    ]  # none half-written
    save("".join(kept), log_path)

    passes = max(c.evolve, 1) * c.iterate
    ends = [round(k * c.steps / passes) for k in range(passes + 1)]  # pass k is the steps from ends[k] to ends[k + 1]
    examples = world.train if world.task else world.logged
    start = [[] if world.task else e.response_ids for e in examples]  # a file's own responses stay in every pool

    def sample(e):
        if e < resumed:
            return [[]] * len(examples)  # this round was over before the checkpoint
        if e > resumed:  # else the run goes on inside round e, with the candidates of the checkpoint
            visits = -(-(ends[(e + 1) * c.iterate] - ends[e * c.iterate]) * c.batch_size // c.iterate)  # prompts a pass
            state.generated, state.evolve = draw_candidates(c, world, state, e, visits), e
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
            for step, chosen in zip(range(first + 1, last + 1), batches_from(c, pool, e, first - ends[e * c.iterate])):
                batch = data.make_batch(chosen, world.enc.eot_token, c.device)
                with precision(c):
                    logps = models.response_logps(state.policy, batch, world.allowed)
                loss, lr = compute_loss(c, logps, batch).mean(), lr_at(step - 1, c.steps, c.lr)
                norm = optimizer_step(state.optimizer, state.policy.parameters(), loss, lr, c.clip)
                if not math.isfinite(norm):
                    raise FloatingPointError(
                        f"step {step}: loss is {loss.item()}, gradient norm {norm}; the last good checkpoint is kept in "
                        f"{c.out}; a smaller --lr may help"
                    )
                state.step = step
                due = step % c.eval_every == 0 or step == c.steps
                if due:
                    latest = quick_evaluation(c, world, state.policy, reference, step)
                if due or step == 1 or step % 10 == 0:
                    row = {"step": step, "evolve": e, "loss": loss.item(), "learning_rate": lr, "grad_norm": norm}
                    row |= batch_metrics(c, logps, batch) | (latest if due else {})
                    log_file.write(json.dumps(row) + "\n")
                    log_file.flush()
                    if due and row["candidates/collapsed"] > 0.9:
                        print(
                            f"step {step}: the listwise softmax has collapsed: one candidate holds over 99 % in "
                            f"{row['candidates/collapsed']:.0%} of the lists; try a higher --temperature or --score mean"
                        )
                shown = "  ".join(f"{k} {v:.2f}" for k, v in sorted(latest.items(), reverse=True))
                progress.show(step, f"loss {loss.item():.4f}  {shown}", line=due)
                if due or interrupted:
                    save_checkpoint(c, state, parts)
                if interrupted:
                    raise KeyboardInterrupt(f"saved after step {step}; `python train.py --resume {c.out}` goes on")
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


def draw_curves(out: Path, metrics: dict) -> None:
    """out/curves.png: reward, KL, loss and the listwise softmax over the steps. Says which package would draw it."""
    try:
        import matplotlib
    except ImportError:
        print("no picture of the curves: pip install matplotlib draws it")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    if not log:
        return
    curve = lambda name: zip(*[(row["step"], row[name]) for row in log if name in row])
    fig, axes = plt.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    names = [
        ("reward", "reward, held-out prompts"),
        ("kl", "KL to the reference, nats"),
        ("loss", "loss"),
        ("candidates/max_prob", "listwise softmax"),
    ]
    if not any("reward" in row for row in log):
        names[0] = ("rewards/accuracies", "best candidate gained more than the worst")
    for ax, (name, title) in zip(axes.flat, names):
        ax.plot(
            *curve(name),
            "o-" if name in ("reward", "kl") else "-",
            ms=3,
            label={"reward": "policy", "candidates/max_prob": "largest P"}.get(name),
        )
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    if "reward" in names[0]:
        for key, label, style in (
            ("reference_reward", "reference", ":"),
            ("best_of_8_reward", "best of 8", "--"),
            ("optimal_reward", "optimum at the final KL", "-."),
        ):
            if metrics.get(key) is not None:
                axes[0, 0].axhline(metrics[key], color="gray", ls=style, label=label)
        axes[0, 0].legend(fontsize=8)
    axes[1, 1].plot(*curve("candidates/entropy"), label="entropy of P, nats")
    axes[1, 1].legend(fontsize=8)
    fig.savefig(out / "curves.png", dpi=120)
    plt.close(fig)
    print(f"curves: {out / 'curves.png'}")


def print_table(pairs, columns: int = 3) -> None:
    """name value, name value, ... in columns."""
    cells = [f"{name:20} {value!s:15}" for name, value in pairs]
    rows = -(-len(cells) // columns)
    for i in range(rows):
        print("  ".join(cells[i::rows]).rstrip())


def main(config: Config) -> dict:
    """One whole run; see the top of this file. Returns the metrics, which are also in out/<run>/metrics.json.

    Raises: ConfigError, data.DataError with one line for the user, before anything is written; FloatingPointError where
    training left the finite numbers (the last good checkpoint is kept).
    """
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
        raise ConfigError(f"--out {out} holds a run already: go on with --resume {out}, or choose another folder")
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
    policy = new_model(c, world)
    policy.load_state_dict(reference.state_dict())
    if c.compile:
        policy.hidden = torch.compile(policy.hidden, dynamic=True)
    seconds["reference"] = time.time() - began
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    state = State(policy, optimizer, digest_of(reference.state_dict()))
    if checkpoint:
        restore(state, checkpoint)
    if c.objective == "sft" or not c.steps:
        save_checkpoint(c, state, parts)  # the policy is the reference
    else:
        seconds |= train_policy(c, world, state, reference, parts)

    began, policy = time.time(), policy.eval()
    choose = lambda examples: random.Random(0).sample(examples, min(c.eval_prompts, len(examples)))
    heldout = choose(world.heldout)
    if world.task:
        metrics, answers = evaluate_task(c, world, policy, reference, heldout, "heldout")
        metrics |= {
            f"ood_{k}": v for k, v in evaluate_task(c, world, policy, reference, choose(world.ood), "ood")[0].items()
        }
    else:
        rows = evaluate_lists(c, world, policy, reference)
        save("".join(json.dumps(row) + "\n" for row in rows), out / "heldout.jsonl")
        metrics = list_metrics(rows) if rows else {}
        if not rows:
            print("the held-out lists have a single response each: no list metrics")
        lists, ratios = sampled_kl(c, world, policy, reference, heldout, 8, "final")
        base = sample_lists(c, world, reference, heldout, 8, rng(c.seed, "final", device=c.device))
        answers = list(zip(heldout, lists, base))
        per_prompt = ratios.mean(-1)
        metrics |= {"kl": per_prompt.mean().item(), "kl_se": standard_error(per_prompt)}
        metrics |= {
            f"{who}_length": sum(len(y) for ys in ls for y in ys) / ratios.numel()
            for who, ls in (("policy", lists), ("reference", base))
        }
    seconds["evaluate"] = time.time() - began
    metrics = finite(metrics)
    metrics |= {f"seconds_{k}": round(v, 1) for k, v in seconds.items()}
    kilobyte = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes
    metrics["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kilobyte)
    save(json.dumps(metrics, indent=1), out / "metrics.json")
    save(side_by_side(world, answers, 10, 4) + "\n", out / "samples.txt")

    print("\n" + side_by_side(world, answers) + "\n")
    print_table([(k, "-" if v is None else f"{v:.3f}" if isinstance(v, float) else v) for k, v in metrics.items()])
    if c.objective != "sft" and c.steps:
        draw_curves(out, metrics)
    print(f"written to {out}/")
    return metrics


def command_line(argv=None) -> Config:
    """Config from the options; --resume takes the settings of its run, and refuses options that say otherwise."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
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
        parser.add_argument("--" + f.name.replace("_", "-"), help=(comments[f.name] + shown).replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        run = given.pop("resume")
        path = Path(run) / "config.json"
        if not path.exists():
            raise ConfigError(
                f"--resume {run}: no config.json in it, expected the folder of a run, such as out/lire-dialogue-0"
            )
        saved = json.loads(path.read_text())
        if unknown := set(saved) - {f.name for f in dataclasses.fields(Config)}:
            raise ConfigError(
                f"--resume {run}: its config.json is of another version (it has {', '.join(sorted(unknown))})"
            )
        if "out" in given:
            raise ConfigError("--resume goes on in the folder of its run: leave --out away")
        if told := difference({k: saved.get(k) for k in given}, given):
            raise ConfigError(
                f"--resume {run}: that run has another config ({told}); leave these options out, or start a new run"
            )
        given = saved | {"resume": run, "out": run}
    return Config(**given)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # whatever a model says, the terminal can show something
    try:
        main(command_line())
    except (ConfigError, data.DataError, FloatingPointError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt as e:
        sys.exit(
            f"\ninterrupted: {e or 'python train.py --resume RUN goes on from the last checkpoint of the folder in out/, if it has one'}"
        )
