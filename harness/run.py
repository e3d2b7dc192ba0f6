"""The folder of a run: files never half written, checkpoints, the log, progress, Ctrl-C."""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config import Config, ConfigError, difference, run_settings
from objectives import OBJECTIVES


def save(content: Any, path: str | Path) -> None:
    """Write text, or what torch.save takes, so that a reader finds the old file or the new one."""
    path, part = Path(path), Path(f"{path}.{os.getpid()}.part")
    with open(part, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode("utf-8", "replace"))
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


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


def set_numerics(c: Config) -> None:
    """Plain float32 products, and on a CPU no subnormal numbers.

    A saturated softmax sends those back through the network, and a CPU multiplies them a hundred
    times slower.
    """
    if c.device == "cpu":
        torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")


# -------------------------------------------------------------------------------------- checkpoints

PLAIN = ("reference", "step", "round_index", "generated", "reward_scale")  # fields of a State


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
    try:
        checkpoint = torch.load(path, map_location=c.device, weights_only=True)
    except Exception as e:  # damaged files fail in many ways
        reason = str(e).splitlines()[0][:80]
        raise ConfigError(f"--resume {c.resume}: {path} is damaged ({reason})") from None
    if changed := difference(checkpoint["config"], run_settings(c)):
        raise ConfigError(f"--resume {c.resume}: its checkpoint is of another config ({changed})")
    if checkpoint["key"]["texts"] != key["texts"]:
        raise ConfigError(
            f"--resume {c.resume}: its data have changed since the checkpoint was written"
        )
    if changed := difference(checkpoint["key"], key):
        print(f"note: the run goes on, but not bit by bit as it would have ({changed})")
    print(f"going on from step {checkpoint['step']} of {c.steps}")
    return checkpoint


def restore(state: Any, checkpoint: dict) -> None:
    """Put a checkpoint into a train.State."""
    for name in PLAIN:
        setattr(state, name, checkpoint[name])
    state.policy.load_state_dict(checkpoint["policy"])
    if state.value:
        state.value.load_state_dict(checkpoint["value"])
    if state.step:
        state.optimizer.load_state_dict(checkpoint["optimizer"])


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
        path = self.log_path
        lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
        save("".join(line for line in whole if json.loads(line)["step"] <= step), path)

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
        checkpoint["policy"] = state.policy.state_dict()
        checkpoint["optimizer"] = state.optimizer.state_dict()
        if state.value:
            checkpoint["value"] = state.value.state_dict()
        checkpoint |= {"config": run_settings(self.c), "key": self.key}
        save(checkpoint, Path(self.c.out) / "checkpoint.pt")


class Progress:
    """One live line on a terminal; plain lines, one at each quick evaluation, in a log."""

    def __init__(self, title: str, total: int, first: int = 0) -> None:
        self.title, self.total, self.first = title, total, first
        self.start, self.shown = time.time(), 0.0
        self.live = sys.stdout.isatty()

    def show(self, step: int, loss: Tensor, metrics: dict, line: bool = False) -> None:
        """Say how far it is; `line`: worth a line of its own where there is no terminal."""
        now = time.time()
        left = (now - self.start) / max(step - self.first, 1) * (self.total - step)
        known = sorted((name for name in metrics if metrics[name] is not None), reverse=True)
        parts = [f"{self.title} {step}/{self.total}", f"loss {loss.item():.4f}"]
        parts += [f"{name} {metrics[name]:.2f}" for name in known]
        text = "  ".join([*parts, f"{left:.0f} s left"])
        if self.live and (line or now - self.shown > 0.2):
            print("\r" + text.ljust(110), end="\n" if step == self.total else "", flush=True)
            self.shown = now
        elif line and not self.live:
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
