"""The command line of train.py: an option for each field of Config, and the way back to a run."""

import argparse
import dataclasses
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from harness.config import (
    FILES,
    ON_FILES,
    ON_TASKS,
    Config,
    ConfigError,
    check_values,
    difference,
    flag,
    kind_of,
    read_json,
)
from objectives import OBJECTIVES
from records import short
from tasks import TASKS


def command_line(argv: list[str] | None = None, description: str = "") -> Config:
    """Config from the options; --resume takes the settings of its run.

    Raises: ConfigError, also where an option says otherwise than the run that is resumed.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(f"train.py: {short(message)}; --help lists the options")
    for f in dataclasses.fields(Config):
        parser.add_argument(flag(f.name), help=_help(f).replace("%", "%%"), **_argument(f))
    given = vars(parser.parse_args(argv))
    if "data" in given and "task" in given:
        raise ConfigError("--task makes the data and --data reads them: give one of the two")
    return _resumed(given) if "resume" in given else Config(**given)


def _argument(option: dataclasses.Field) -> dict[str, Any]:
    """What argparse has to know of a field."""
    kind = kind_of(option)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is list:
        return {"nargs": "+", "action": "extend", "type": str}
    return {"type": kind}


def _help(option: dataclasses.Field) -> str:
    """The text of a field, its choices and its default: one for all, or each with who has it."""
    text, choices = option.metadata["text"], option.metadata["choices"]
    if choices:
        text += f": {', '.join(choices)}"
    if option.default not in (MISSING, None, ""):
        return f"{text} (default {option.default})"
    sources = {"": ON_TASKS, "files": {k: v for k, v in ON_FILES.items() if ON_TASKS.get(k) != v}}
    sources |= {name: row.defaults for name, row in TASKS.items()}
    sources |= {name: row.run_defaults() | row.on_tasks for name, row in OBJECTIVES.items()}
    values = {}  # default -> who has it
    for source, defaults in sources.items():
        if defaults.get(option.name) is not None:
            values.setdefault(str(defaults[option.name]), []).append(source)
    if not values:
        return text
    whose = {
        value: "" if "" in names else " " + ", ".join(names) for value, names in values.items()
    }
    shown = [f"{value}{names}" for value, names in whose.items()]
    return f"{text} (default {'; '.join(shown)})"


def saved_config(run: str) -> Config:
    """The settings that a run was begun with, from its folder.

    Raises: ConfigError where there are none, or where they are damaged.
    """
    path = Path(run) / "config.json"
    if not path.exists():
        raise ConfigError(
            f"{short(run)}: no config.json in it, expected the folder of a run, such as "
            "out/lire-dialogue-0"
        )
    if not (saved := read_json(path)):
        raise ConfigError(f"{path} is damaged, expected the settings of the run as JSON")
    if unknown := set(saved) - {f.name for f in dataclasses.fields(Config)}:
        names = short(", ".join(sorted(unknown)))
        raise ConfigError(f"{path} is of another version (it has {names})")
    config = Config(**saved)
    try:
        check_values(config)
    except ConfigError as e:
        raise ConfigError(f"{path} is damaged ({e})") from None
    return config


def _resumed(given: dict[str, Any]) -> Config:
    """The Config of the run that is resumed; its files may have moved."""
    check_values(Config(**given))  # argparse makes an empty list of --resume=--
    run = given.pop("resume")
    try:
        saved = vars(saved_config(run))
    except ConfigError as e:
        raise ConfigError(f"--resume {e}") from None
    if given.get("device") == "auto":
        del given["device"]  # the run has chosen one
    if "out" in given:
        raise ConfigError("--resume goes on in the folder of its run: leave --out away")
    moved = {name: given.pop(name) for name in FILES if saved.get(name) and name in given}
    if changed := difference({name: saved.get(name) for name in given}, given):
        raise ConfigError(
            f"--resume {run}: that run has another config ({changed}); leave these options out, or "
            "start a new run"
        )
    return Config(**(saved | moved | {"resume": run, "out": run}))
