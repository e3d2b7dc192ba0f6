"""The folder of a run: files never half written, checkpoints, the log, progress, Ctrl-C."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import DataError, save_ranks
from harness.config import FILES, Config, ConfigError, difference, read_object, run_settings
from harness.pretrained import HubEncoding
from model import GPTConfig
from objectives import OBJECTIVES
from records import short


def save(content: Any, path: str | Path) -> None:
    """Write text, or what torch.save takes, so that a reader finds the old file or the new one.

    Raises: OSError where it can't be written, such as on a full disk; the old file is kept.
    """
    path, part = Path(path), Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8", "replace"))
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save tells of a full disk by a RuntimeError
        raise OSError(f"{path} can't be written ({reason_of(e)})") from None
    finally:
        part.unlink(missing_ok=True)


def reason_of(error: BaseException) -> str:
    """The first line of an error, cut to 80 characters, or its name where it says nothing."""
    return next(iter(str(error).splitlines()), "")[:80] or type(error).__name__


def digest_of(content: Any) -> str:
    """sha256 over all names, numbers and tensors of nested dicts and lists."""
    digest, nested = hashlib.sha256(), (list, dict, torch.Tensor)

    def add(value):
        if isinstance(value, torch.Tensor):
            whole = value.detach().cpu().contiguous()
            digest.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
            digest.update(whole.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)}:".encode())
            for name, item in value.items():
                digest.update(f"{name!r}:".encode())
                add(item)
        elif isinstance(value, list) and any(isinstance(item, nested) for item in value):
            digest.update(f"list {len(value)}:".encode())
            for item in value:
                add(item)
        else:  # a plain value, or a list of token ids
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------- the folder


def check_folder(c: Config) -> Path:
    """The folder of the run.

    Raises: ConfigError where it is not to be had.
    """
    out = Path(c.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, expected a folder")
    if not c.resume and (out / "config.json").exists():
        raise ConfigError(
            f"--out {out} holds a run already: go on with --resume {out}, or choose another folder"
        )
    return out


def new_folder(path: str) -> Path:
    """A folder to write into, which may be there but holds nothing.

    Raises: ConfigError where it holds something, or is a file.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{path} is there already and not empty, expected a new folder")
    return folder


def describe_model(model: nn.Module, world: Any, folder: Path) -> None:
    """Write model.json and the tokenizer: what --init reads of a run, but for its weights."""
    kind = "gpt" if isinstance(model.config, GPTConfig) else "t5"
    elsewhere = world.init is not None and world.init.from_elsewhere
    content = {"model": kind, "from_elsewhere": elsewhere} | dataclasses.asdict(model.config)
    save(json.dumps(content, indent=1), folder / "model.json")
    if world.ranks:
        save_ranks(world.ranks, folder / "tokenizer.txt")
    elif isinstance(world.enc, HubEncoding):
        save(world.enc.text, folder / "tokenizer.json")


def remove_parts(folder: Path) -> None:
    """Remove what processes that are dead now left half written."""
    for part in folder.glob("*.part"):
        process = part.name.split(".")[-2]
        try:
            if int(process) == os.getpid():  # of one that had our number, as in a container
                raise ProcessLookupError
            os.kill(int(process), 0)  # asks whether it lives
        except (ValueError, OverflowError, ProcessLookupError):
            part.unlink(missing_ok=True)
        except OSError:
            pass  # it lives, and is somebody else's


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, which is made; the lock dies with its process.

    Raises: ConfigError where another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is in use: another process is running in it; wait for it, or choose "
                "another --out"
            ) from None
        remove_parts(folder)
        yield


# -------------------------------------------------------------------------------------- checkpoints

PLAIN = {  # of a State
    "reference": str,
    "step": int,
    "round_index": int,
    "generated": list | None,
    "reward_scale": list | None,
    "pool_metrics": dict | None,
}
PARTS = PLAIN | dict.fromkeys(("policy", "optimizer", "config", "key"), dict)


def read_checkpoint(path: Path, device: str) -> dict:
    """What Run.save has written there.

    Raises: ConfigError where it is damaged.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint.pop("digest", None) != digest_of(checkpoint):
            raise ValueError("its content does not match its digest")
        for name, kind in PARTS.items():
            if name not in checkpoint or not isinstance(checkpoint[name], kind):
                raise ValueError(f"its part {name} is missing or of another kind")
    except Exception as e:  # damaged files fail in many ways
        raise ConfigError(f"{path} is damaged or of another version ({reason_of(e)})") from None
    return checkpoint


def load_checkpoint(c: Config, key: dict[str, str]) -> dict | None:
    """The checkpoint to go on from; None for a new run, or before the first one.

    Raises: ConfigError where it is damaged, or belongs to another run.
    """
    path = Path(c.out) / "checkpoint.pt"
    if not c.resume:
        return None
    if not path.exists():
        print(f"{c.resume} has no checkpoint yet: starting over")
        return None
    checkpoint = read_checkpoint(path, c.device)
    step, old_key = checkpoint["step"], checkpoint["key"]
    both = checkpoint["config"], run_settings(c)
    there, here = ({k: v for k, v in d.items() if k not in FILES} for d in both)
    if changed := difference(there, here):
        raise ConfigError(f"--resume {c.resume}: its checkpoint is of another config ({changed})")
    if not 0 <= step <= c.steps:
        raise ConfigError(f"{path} is damaged (it is of step {step}, the run has {c.steps})")
    if any(old_key.get(name) != key[name] for name in ("texts", "rounds")):
        raise ConfigError(
            f"--resume {c.resume}: its data have changed since the checkpoint was written"
        )
    if changed := difference(old_key, key):
        print(f"note: the run goes on, but not bit by bit as it would have ({changed})")
    print(f"going on from step {step} of {c.steps}")
    return checkpoint


def restore(state: Any, checkpoint: dict) -> None:
    """Put a checkpoint into a train.State.

    Raises: ConfigError where it does not fit.
    """
    try:
        for name in PLAIN:
            setattr(state, name, checkpoint[name])
        if state.generated is not None:
            state.generated = nested(*state.generated)
        state.policy.load_state_dict(checkpoint["policy"])
        if state.value_network:
            state.value_network.load_state_dict(checkpoint["value"])
        if state.step:
            state.optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, moments in state.optimizer.state.items():  # torch does not compare them
            if any(moment.dim() and moment.shape != parameter.shape for moment in moments.values()):
                raise ValueError("its optimizer is of another size")
    except Exception as e:
        raise ConfigError(f"the checkpoint does not fit this run ({reason_of(e)})") from None


def flat(lists: list[list[list[int]]]) -> list[Tensor]:
    """Responses [[ids, ...], ...], M of each prompt, as two tensors, which are saved in no time.

    Returns: all ids in one row; the lengths [prompts, M].
    """
    ids = [token for responses in lists for response in responses for token in response]
    lengths = [[len(response) for response in responses] for responses in lists]
    return [torch.tensor(ids, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)]


def nested(ids: Tensor, lengths: Tensor) -> list[list[list[int]]]:
    """What `flat` was given."""
    tokens = iter(ids.tolist())
    return [[list(itertools.islice(tokens, n)) for n in row] for row in lengths.tolist()]


# ------------------------------------------------------------------------------------ while it runs


class Run:
    """A run while it is under way: its log, checkpoints and clock, and whether it should stop."""

    def __init__(self, c: Config, key: dict[str, str], began: float) -> None:
        """key: tells sources and data of a checkpoint apart (reference.cache_key)."""
        self.c, self.key, self.last = c, key, began
        self.log_path = Path(c.out) / "log.jsonl"
        self.seconds: dict[str, float] = {}
        self.stop: list = []  # not empty: Ctrl-C was pressed
        self.way_on = f"`python train.py --resume {c.out}` goes on"

    def lap(self, part: str) -> None:
        """The time since the last lap went into this part of the run."""
        now = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def costs(self) -> dict[str, float]:
        """Seconds of each part of the run, and its peak memory."""
        unit = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        seconds = {f"seconds_{part}": round(spent, 1) for part, spent in self.seconds.items()}
        return seconds | {"peak_memory_mb": round(peak)}

    def start_log(self, step: int) -> None:
        """Keep the rows of log.jsonl up to `step`: a resumed run writes the later ones anew."""
        path, kept, damaged = self.log_path, [], 0
        lines = []
        if step and path.exists():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
        for line in lines:
            row = read_object(line)
            if not row or not isinstance(row.get("step"), int) or not line.endswith("\n"):
                damaged += line.endswith("\n")  # a kill may leave half of the last line
            elif row["step"] <= step:
                kept.append(line)
        if damaged:
            print(f"{path}: {damaged} damaged lines are left out")
        save("".join(kept), path)

    def log(self, row: dict) -> None:
        """Write a row of log.jsonl."""
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")
        warning = OBJECTIVES[self.c.objective].warning(row)
        if warning and "kl" in row:  # a quick evaluation was due
            print(f"step {row['step']}: {warning}")

    def save(self, state: Any) -> None:
        """out/<run>/checkpoint.pt: all that a train.State needs to go on to the same bits."""
        checkpoint = {name: getattr(state, name) for name in PLAIN}
        if state.generated is not None:
            checkpoint["generated"] = flat(state.generated)
        checkpoint["policy"] = state.policy.state_dict()
        checkpoint["optimizer"] = state.optimizer.state_dict()
        if state.value_network:
            checkpoint["value"] = state.value_network.state_dict()
        checkpoint |= {"config": run_settings(self.c), "key": self.key}
        checkpoint["digest"] = digest_of(checkpoint)
        save(checkpoint, Path(self.c.out) / "checkpoint.pt")

    def kept(self) -> str:
        """What a run that goes wrong leaves behind, in words."""
        if (Path(self.c.out) / "checkpoint.pt").exists():
            kept = f"the last good checkpoint is kept in {self.c.out}"
        else:
            kept = "it came before the first checkpoint"
        return f"{kept}; where loss or grad_norm grew before in log.jsonl, a smaller --lr helps"


class Progress:
    """One live line on a terminal; plain lines, one at each quick evaluation, in a log."""

    def __init__(self, title: str, total: int, first: int = 0) -> None:
        self.title, self.total, self.first = title, total, first
        self.start, self.shown = time.time(), 0.0
        self.live = sys.stdout.isatty()

    def show(self, step: int, loss: Tensor, metrics: dict, line: bool = False) -> None:
        """Say how far it is; `line`: worth a line of its own where there is no terminal."""
        now = time.time()
        if not line and not (self.live and now - self.shown > 0.2):
            return  # without asking for the loss: a GPU works on
        left = (now - self.start) / max(step - self.first, 1) * (self.total - step)
        known = sorted((name for name in metrics if metrics[name] is not None), reverse=True)
        parts = [f"{self.title} {step}/{self.total}", f"loss {loss.item():.4f}"]
        parts += [f"{name} {metrics[name]:.2f}" for name in known]
        text = "  ".join([*parts, f"{left:.0f} s left"])
        if self.live:
            print("\r" + text.ljust(110), end="\n" if step == self.total else "", flush=True)
            self.shown = now
        else:
            print(text, flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[list]:
    """Ctrl-C inside asks to stop after the present step: the list becomes non-empty.

    A second one stops at once.
    """
    asked = []

    def ask(signum, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        print(
            "\nstopping after the next step; Ctrl-C again stops at once and loses the steps since "
            "the last checkpoint"
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


# --------------------------------------------------------------------------------------- a script


def run_script(name: str, script: Callable[[], Any], *others: type[Exception]) -> None:
    """Call a script's work; what the user can mend ends it with one line, not with a traceback.

    Args: others: errors of other packages that say what to mend.
    """
    if sys.stdout is None:  # closed by whoever started it
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # whatever a model says, the terminal shows something
    try:
        try:
            script()
        finally:
            sys.stdout.flush()  # here, where a broken pipe is caught
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, DataError, FloatingPointError, OSError, *others) as e:
        sys.exit(short(f"{name}: {e}", 300))
    except KeyboardInterrupt as e:
        way_on = "python train.py --resume RUN goes on from the last checkpoint, if there is one"
        sys.exit(f"\ninterrupted: {e or way_on}")
