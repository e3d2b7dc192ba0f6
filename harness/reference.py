"""Where the policy starts from: a model trained on the logged responses (SFT), and its cache."""

import contextlib
import hashlib
import inspect
import json
import sys
from pathlib import Path

import torch
from torch import nn

import t5
from data import batch_order, make_batch
from harness.config import Config, ConfigError, flag, read_json
from harness.pool import World, precision, rng
from harness.run import Progress, digest_of, reason_of, remove_parts, save
from harness.update import update
from model import GPT, GPTConfig, response_logps


def new_model(c: Config, world: World) -> nn.Module:
    """A model of the configured size, with weights drawn from the seed alone.

    One of --init's size has no weights yet: its own are loaded, and drawing others takes seconds.
    """
    enc, size = world.enc, {"layers": c.layers, "heads": c.heads, "width": c.width}
    if world.init:
        with torch.device("meta"):
            model = world.init.new_model()
        return model.to_empty(device=c.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        if c.model == "gpt":
            context = c.max_prompt + c.max_response
            config = GPTConfig(enc.n_vocab, context, eos=enc.eot_token, **size)
            return GPT(config).to(c.device)
        inner = {"head_width": c.width // c.heads, "mlp_width": 2 * c.width}  # as T5 v1.1 small
        config = t5.T5Config(enc.n_vocab, eos=enc.eot_token, start=enc.n_vocab, **inner, **size)
        return t5.T5(config).to(c.device)


# ------------------------------------------------------------------------------------- its training


def train_reference(c: Config, world: World) -> nn.Module:
    """SFT on the logged responses, good and bad alike: mean negative log-likelihood per token."""
    weights = world.init.weights() if world.init else None  # first: it may refuse
    model = new_model(c, world)
    if weights:
        model.load_state_dict(weights)
        del weights  # a copy
    groups = [{"params": list(model.parameters()), "peak": c.reference_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    progress, batches, epoch = Progress("reference", c.reference_steps), [], 0
    for step in range(1, c.reference_steps + 1):
        if not batches:
            batches = batch_order(world.logged, c.reference_batch, rng(c.seed, "reference", epoch))
            epoch += 1
        batch = make_batch([world.logged[i] for i in batches.pop()], world.enc.eot_token, c.device)
        with precision(c):
            logps = response_logps(model, batch, world.allowed)
        loss = -logps.sum() / batch.response_mask.sum()
        update(optimizer, loss, step, c.reference_steps, 1.0)
        line = step % 200 == 0 or step == c.reference_steps
        progress.show(step, loss, {}, line)
    return model


# ---------------------------------------------------------------------------------------- the cache

SOURCES = (
    "model t5 data tasks files containers formats records harness.pool harness.update "
    "harness.reference harness.pretrained"
).split()
SETTINGS = (
    "max_prompt max_response model layers heads width tokenizer vocab_size reference_steps "
    "reference_lr reference_batch"
).split()


def cache_key(c: Config, world: World) -> dict[str, str]:
    """All that the reference depends on, one hash or value each."""
    key = {}
    for name in SOURCES:
        source = inspect.getsource(sys.modules[name])
        key[f"{name}.py"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    key |= {
        "torch version": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "dtype": c.dtype,
        "device": c.device,
        "seed": str(c.seed),
        "texts": world.fingerprint[:16],
    }
    if world.init and c.reference_steps:
        key["weights of --init"] = world.init.digest()[:16]
    return key | {flag(name): str(getattr(c, name)) for name in SETTINGS}


def get_reference(
    c: Config, world: World, key: dict[str, str], checkpoint: dict | None = None
) -> nn.Module:
    """The reference model: the resumed run's own, else from the cache, else trained and cached.

    The cache lies beside the run; what is read is verified by its digest.
    Raises: ConfigError where a resumed run's own reference is damaged.
    """
    if checkpoint:
        return _own_reference(c, world, checkpoint["reference"])
    if world.init and not c.reference_steps:
        print(f"reference: {c.init}")
        return train_reference(c, world).eval()
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = Path(c.out).parent / "reference"
    path = folder / f"{name}.pt"
    remove_parts(folder)
    if path.exists():
        try:
            model = _read_cached(c, world, path)
            print(f"reference: {path} (cached)")
            return model
        except Exception as e:
            # Damaged files fail in many ways, and all of them mean: train it again.
            print(f"reference: {path} is damaged ({reason_of(e)}), training it again")
    elif others := list(filter(None, map(read_json, sorted(folder.glob("*.json"))))):
        changed = min(([k for k in key if other.get(k) != key[k]] for other in others), key=len)
        print(f"reference: none cached for this; the nearest one differs in {', '.join(changed)}")
    try:
        model = train_reference(c, world).eval()
    except FloatingPointError as e:
        raise FloatingPointError(f"reference {e}; a smaller --reference-lr may help") from None
    weights = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save({"weights": weights, "digest": digest_of(weights)}, path)
    save(json.dumps(key, indent=1), folder / f"{name}.json")
    return model


def _read_cached(c: Config, world: World, path: Path) -> nn.Module:
    cached = torch.load(path, map_location=c.device, weights_only=True)
    if cached["digest"] != digest_of(cached["weights"]):
        raise ValueError("its weights do not match their digest")
    model = new_model(c, world)
    model.load_state_dict(cached["weights"])
    return model.eval()


def _own_reference(c: Config, world: World, digest: str) -> nn.Module:
    """out/<run>/reference.pt, with this digest."""
    model, path = new_model(c, world), Path(c.out) / "reference.pt"
    with contextlib.suppress(Exception):  # a damaged file fails in many ways; the digest decides
        model.load_state_dict(torch.load(path, map_location=c.device, weights_only=True))
    if digest_of(model.state_dict()) != digest:
        raise ConfigError(
            f"--resume {c.resume}: {path} is damaged or not the reference that this run began with"
        )
    return model.eval()
