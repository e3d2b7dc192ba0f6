"""A reward of one's own: --reward FILE.py:function gives the prompts of a file what a task has."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from harness.config import Config, ConfigError
from records import is_number, short
from tasks import Task


def own_reward(named: str) -> tuple[Callable[[str, str], float], str]:
    """The function (prompt, response) -> number that FILE.py:function names, and FILE's source.

    Whatever goes wrong in it, now or later, is a ConfigError with the line where it did.
    """
    path, _, name = named.rpartition(":")
    say = f"--reward {short(named)}"
    if not (path.endswith(".py") and name.isidentifier()):
        raise ConfigError(f"{say}: expected FILE.py:function")
    path = os.path.abspath(path)  # as a traceback names it
    try:
        source = Path(path).read_text()
        spec = importlib.util.spec_from_file_location("own_reward", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where a dataclass in it looks
        spec.loader.exec_module(module)
    except OSError as e:
        raise ConfigError(f"{say}: {e.strerror or e}") from None
    except (Exception, SystemExit) as e:
        raise ConfigError(f"{say}: {reason(e, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{say}: the file has no function {name}")

    def reward(prompt: str, response: str) -> float:
        try:
            value = function(prompt, response)
            value = value.item() if hasattr(value, "item") else value  # of numpy or torch
        except (Exception, SystemExit) as e:
            why = reason(e, path)
            raise ConfigError(f"{say}: {why}, at the response {short(repr(response))}") from None
        if not is_number(value):
            raise ConfigError(
                f"{say}: it returned {short(repr(value))} for the response "
                f"{short(repr(response))}, expected a finite number (up to 1e30)"
            )
        return float(value)

    return reward, source


def reason(error: BaseException, path: str) -> str:
    """An exception in one line, with the last line of the user's file on the way to it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    where = f"line {line}: " if line else ""
    return f"{where}{type(error).__name__}: {short(error)}"


def task_of_files(c: Config, records: list[dict], heldout: list[dict]) -> tuple[Task, str]:
    """The prompts of a file as a Task with the reward of --reward; and the reward's source."""
    reward, source = own_reward(c.reward)
    reward(records[0]["prompt"], records[0]["responses"][0])  # a slip shows before the reference
    train, held = (list(dict.fromkeys(r["prompt"] for r in lists)) for lists in (records, heldout))

    def answers(prompt, generator):
        raise NotImplementedError("a file's own responses are its lists")

    return Task("files", train, held, [], answers, reward, c.max_response), source
