"""What tests share: short runs, made-up files, what a run leaves, who imports whom; gradients."""

import ast
import contextlib
import gzip
import inspect
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dro
import files
import train
from harness.config import Config, resolve
from harness.pool import make_world
from harness.reference import new_model
from harness.run import nested
from objectives import OBJECTIVES

ROOT = Path(train.__file__).parent
DATA_DIR = Path(os.environ.get("LIRE_DATA_DIR", ROOT.parent / "shared" / "data"))

# ------------------------------------------------------------------------------------------ configs

SMALL = {
    "task": "tiny",
    "reference_steps": 40,
    "steps": 12,
    "evolve": 2,
    "batch_size": 4,
    "iterate": 1,
    "reference_batch": 4,
    "eval_prompts": 3,
    "eval_samples": 16,
    "eval_every": 4,
    "layers": 1,
    "heads": 2,
    "width": 32,
}


def small(folder, **settings) -> Config:
    """A run of a second; on files it makes no rounds, as there is nothing to sample for."""
    own = {"evolve": None, "vocab_size": 300} if settings.get("data") else {}
    return Config(**{**SMALL, "device": "cpu", "out": str(folder), **own, **settings})


def flags(folder, **settings) -> list[str]:
    """The same as options of the command line."""
    pairs = {**SMALL, "device": "cpu", "out": folder, **settings}
    return [word for k, v in pairs.items() for word in ("--" + k.replace("_", "-"), str(v))]


def untrained(**settings):
    """(c, world, model): a model with fresh weights where a run would have its reference."""
    c = resolve(small("unused", **settings))
    world = make_world(c)
    return c, world, new_model(c, world)


def loop_state(**settings):
    """(c, world, state, reference) as the loop finds them before its first step."""
    c, world, model = untrained(**settings)
    return c, world, train.new_state(c, world, model), model


@contextlib.contextmanager
def failing(step, objective="lire"):
    """Inside, the machine is lost in this step of a run (the first call is the trial before it)."""
    row, calls = OBJECTIVES[objective], []

    def loss(c, x):
        calls.append(1)
        if len(calls) == step + 1:
            raise OSError("the machine is gone")
        return row.loss(c, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, objective, row._replace(loss=loss))
        yield


# -------------------------------------------------------------------------------------------- files

LISTS = [
    {
        "prompt": f"What is {i} like?",
        "responses": ["Fine, thank you.", "Bad.", "So so."][: 2 + i % 2],
        "rewards": [1.0, 0.0, 0.5][: 2 + i % 2],
    }
    for i in range(60)
]
SINGLES = [
    {"prompt": f"What is {i} like?", "response": "Fine." if i % 2 else "Bad.", "reward": i % 2}
    for i in range(60)
]
THUMBS = [
    {"prompt": row["prompt"], "completion": row["response"], "label": bool(row["reward"])}
    for row in SINGLES
]


def load(*paths, **options):
    """Records of files, and the lines of news."""
    news = []
    return files.load(paths, say=news.append, **options), news


def load_error(*paths, **options) -> str:
    """Why files are refused."""
    with pytest.raises(files.DataError) as e:
        load(*paths, **options)
    return str(e.value)


def write(folder, *lines, name="lists.jsonl") -> str:
    """A file of these lines: records, strings or bytes."""
    path = folder / name
    raw = []
    for line in lines:
        text = line if isinstance(line, (str, bytes)) else json.dumps(line)
        raw.append(text if isinstance(text, bytes) else text.encode())
    with (gzip.open if name.endswith(".gz") else open)(path, "wb") as file:
        file.write(b"".join(line + b"\n" for line in raw))
    return str(path)


# ------------------------------------------------------------------------------ what a run has left


def checkpoint(folder) -> dict:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def generated(folder) -> list:
    """The responses of the last round, [[ids, ...], ...] of its prompts."""
    return nested(*checkpoint(folder)["generated"])


def weights(folder) -> dict:
    """Of the policy."""
    return checkpoint(folder)["policy"]


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(one, other) -> bool:
    """Are two state dicts the same bits?"""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------------ sources

FOLDERS = ("", "harness", "experiments", "exercises")  # what is local, but for tests


def sources() -> dict[str, Path]:
    """{module: path} of the repository without tests; an empty __init__.py is no module."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in paths
        if path.name != "__init__.py" or path.read_text().strip()
    }


def imports(path, local) -> set[str]:
    """Those of the `local` modules that a file imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import hides what it reads"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(local)


# ----------------------------------------------------------------------------- losses and gradients

REF, REWARDS = (0.5, 0.3, 0.2), (1.0, 0.0, -1.0)  # three responses: reference, rewards


def close(value, expected, tol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tol,
        atol=tol,
    )


def gradients(function, *inputs):
    """d function / d each input, summed over the outputs; None where there is none."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)


def gradient(loss, logps, *rest):
    """d loss / d logps, summed over the outputs; the other arguments are constants."""
    return gradients(lambda x: loss(x, *rest), logps)[0]


def public(module):
    """Names of the functions that a file defines for others."""
    named = inspect.getmembers(module, inspect.isfunction)
    return {name for name, f in named if f.__module__ == module.__name__ and name[0] != "_"}


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations make inside: those alive (now, at most), the largest."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.largest = 0
        self.alive = {}  # storage -> bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.alive:
                self.note(x.untyped_storage())
        return result

    def note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.alive[key] = size
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.alive.pop(key)


def check_constants(function, learned, **inputs):
    """Only the inputs named in `learned` get a gradient: the one that they get beside constants."""
    leaves = lambda chosen: {
        name: x.detach().clone().requires_grad_(name in chosen) for name, x in inputs.items()
    }
    alone, every = leaves(learned), leaves([k for k, x in inputs.items() if x.is_floating_point()])
    expected, value = function(**alone), function(**every)
    assert torch.equal(value, expected) and value.requires_grad == bool(learned)
    if learned:
        expected.square().sum().backward(), value.square().sum().backward()
    for name in inputs:
        if name in learned:
            assert every[name].grad.abs().sum() > 0, name
            assert torch.equal(every[name].grad, alone[name].grad), name
        else:
            assert every[name].grad is None, name


def tensors(ref=REF, rewards=REWARDS):
    """One prompt: log-probabilities of the reference and rewards, [1, M]."""
    row = lambda numbers: torch.tensor([numbers], dtype=torch.float64)
    return row(ref).log(), row(rewards)


def problem(B=5, M=7, seed=0):
    """B prompts with M enumerated responses: log-probabilities of a random reference, rewards."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, M, generator=generator, dtype=torch.float64)
    return draw().log_softmax(-1), 2 * draw()


def mean_kl(logps, ref_logps):
    return dro.kl_divergence(logps, ref_logps).mean().item()


def reward_of(logps, rewards):
    return (logps.exp() * rewards).sum(-1).mean().item()
