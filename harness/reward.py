"""A reward of one's own: --reward FILE.py:function gives the prompts of a file what a task has."""

import importlib.util
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
    path, colon, name = named.rpartition(":")
    say = f"--reward {short(named)}"
    if not (colon and path and name.isidentifier()):
        raise ConfigError(f"{say}: expected FILE.py:function")
    try:
        source = Path(path).read_text()
        spec = importlib.util.spec_from_file_location("own_reward", path)
        module = importlib.util.module_from_spec(spec)
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
    return f"line {line}: {type(error).__name__}: {short(error)}"


def task_of_files(c: Config, records: list[dict], heldout: list[dict]) -> tuple[Task, str]:
    """The prompts of a file as a Task with the reward of --reward; and the reward's source."""
    reward, source = own_reward(c.reward)
    train, held = (list(dict.fromkeys(r["prompt"] for r in lists)) for lists in (records, heldout))

    def answers(prompt, generator):
        raise NotImplementedError("a file's own responses are its lists")

    return Task("files", train, held, [], answers, reward, c.max_response), source
