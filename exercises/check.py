"""Check an exercise, or all of them.

    python -m exercises.check 3                      your answer in exercises/ex03_....py
    python -m exercises.check 3 --file mine.py       an answer that lies elsewhere
    python -m exercises.check all --report results.json

from the folder of the repository; from elsewhere, python path/to/exercises/check.py 3.
Every answer runs in a process of its own, with a limit of time, so that no file can hold up or
change the result of another. What it prints is shown below its result. --report writes what
autograders read (tests, score, max_score, output); --checks DIR takes the properties from there
(ex01.py ...) in place of exercises/checks.
"""

import argparse
import ast
import bdb
import contextlib
import errno
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

if not __package__:  # run as a file: then its own folder is on the path, and not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from exercises.fence import LARGEST_FILE, MEMORY, Refused, fence, is_inside, set_limits
from exercises.judge import UNKNOWN, Property, Watched, Wrong

FOLDER = Path(__file__).resolve().parent
NUMBERS = range(1, 11)
SECONDS = dict.fromkeys(NUMBERS, 60.0) | {10: 180.0}  # for all properties of an exercise
# Beside FORBIDDEN of an exercise: what judges an answer holds it too.
JUDGES = ("tests", *(f"exercises.{name}" for name in ("check", "checks", "judge", "oracle")))


class Result(NamedTuple):
    """What came out for a property."""

    name: str
    points: int
    state: str  # passed, wrong, not started
    message: str = ""


def answer_path(number: int) -> Path:
    """The file that a student writes in: of several, copies of it, the one of the shortest name."""
    found = FOLDER.glob(f"ex{number:02}_*.py")
    missing = FOLDER / f"ex{number:02}_file_is_missing.py"
    return min(found, key=lambda path: len(path.name), default=missing)


def load(path: Path, name: str) -> ModuleType:
    """A file as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forbidden_import(path: Path, forbidden: tuple[str, ...]) -> str:
    """What to say of an answer that can't be read, or imports what it should write."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as e:
        return f"line {e.lineno or 1} is no Python: {e.msg}"
    except (OSError, ValueError, RecursionError, MemoryError) as e:  # too deep for the parser, say
        return f"{path} can't be read ({type(e).__name__})"
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if is_inside(name, forbidden):
                return f"line {node.lineno} imports {name}, where the answer stands: write it here"
    return ""


# ------------------------------------------------------------------------------ the child's process


def run_answer(
    path: Path, checks: Path, printed: str, limit: float, connection: Connection
) -> None:
    """In a child: load the answer, try every property, send a Result's parts for each."""
    if hasattr(os, "setsid"):
        os.setsid()  # what it starts can be ended with it
    with open(printed, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raw = open(1, "wb", buffering=0, closefd=False)  # nothing is kept back when it is stopped
    sys.stdout = sys.stderr = io.TextIOWrapper(raw, "utf-8", "replace", write_through=True)
    torch.set_num_threads(1)
    properties = load(checks, "checks")
    forbidden = (*properties.FORBIDDEN, *JUDGES)
    for name in forbidden:
        sys.modules[name] = None  # an import of it fails, however it is written
    set_limits()
    fence(path, checks.parent, forbidden)
    try:
        answer = Watched(load(path, "answer"))
    except BaseException as e:
        connection.send(("unloaded", failure(e, path)))
        return
    failed = []
    for index, item in enumerate(properties.PROPERTIES):
        connection.send(("began", index))
        torch.manual_seed(index)
        state, message = try_property(item, answer, path, failed)
        failed += [item.name] if state == "wrong" else []
        connection.send((state, message))


def try_property(item: Property, answer: Watched, path: Path, failed: list[str]) -> tuple[str, str]:
    """(state, message) of a property; failed: the names of those that don't hold."""
    answer.forget()
    try:
        with np.errstate(all="ignore"):  # mistakes are computed too, from nan and inf
            item.holds(answer)
    except NotImplementedError as e:
        if str(e).startswith("exercise "):  # torch has errors of this name too
            return "not started", str(e)
        return "wrong", "  " + failure(e, path)
    except Wrong as e:
        first = [name for name in item.after if name in failed]
        if first and e.cause == UNKNOWN:
            return "wrong", f'  mend "{first[0]}" first: this asks the same function, or needs it'
        parts = {"given": answer.given, "expected": e.expected, "got": e.got, "likely": e.cause}
        return "wrong", "\n".join(f"  {name:9} {text}" for name, text in parts.items() if text)
    except BaseException as e:
        return "wrong", "  " + failure(e, path)
    if answer.changed:  # no points are lost by it, as the numbers are right
        name = answer.changed[0]
        return "passed", f"  {name} changes a tensor that it is given: see exercise 6, program D"
    return "passed", ""


def failure(error: BaseException, path: Path) -> str:
    """An exception of an answer, in one sentence with the line of the answer that it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    where = f"line {frames[-1].lineno}" if frames else "the call of your function"
    if isinstance(error, SystemExit):
        return f"{where} ends the program: return instead"
    if isinstance(error, Refused):
        return f"{where} {error}"
    if isinstance(error, bdb.BdbQuit):
        return "there is no debugger here: print instead of breakpoint()"
    if isinstance(error, ModuleNotFoundError) and "None in sys.modules" in str(error):
        return f"{where} imports {error.name}, where the answer stands: write it here"
    if isinstance(error, AttributeError) and not frames:
        return f"{error}: is the name as in the skeleton?".replace("module 'answer'", "your file")
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"{where} writes more than {LARGEST_FILE >> 20} MB: an endless loop?"
    first = words_of(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in first:
        return f"{where} asks for more than {MEMORY >> 30} GB of memory: look at the shapes"
    hint = next((hint for words, hint in HINTS.items() if words in first), "")
    return f"{where} fails: {type(error).__name__}: {first}".rstrip(": ") + hint


HINTS = {  # for what torch says
    "must match the size of tensor": ": [B] against [B, M]? x[:, None] makes [B, 1] of [B]",
    "not implemented for 'Long'": ": these are whole numbers, x.float() makes others of them",
}


def words_of(error: BaseException) -> str:
    """The first line of what an exception says."""
    try:
        return next(iter(str(error).splitlines()), "")[:200]
    except Exception:  # one of an answer's own, that can't be read
        return ""


# ----------------------------------------------------------------------------------- the parent's


def check(
    number: int, path: Path | None = None, checks: Path | None = None, limit: float | None = None
) -> tuple[list[Result], str]:
    """Results of every property of an exercise, and what the answer printed.

    Args: path: the answer (default: the student's file); checks: the folder of the properties;
        limit: seconds for all of them (default: of SECONDS).
    """
    limit = limit or SECONDS[number]
    path = (path or answer_path(number)).resolve()
    source = (checks or FOLDER / "checks") / f"ex{number:02}.py"
    properties = load(source, f"checks_{number}")
    if problem := forbidden_import(path, (*properties.FORBIDDEN, *JUDGES)):
        return [
            Result(p.name, p.points, "wrong", f"  {problem}") for p in properties.PROPERTIES
        ], ""

    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        printed = str(Path(folder) / "printed")
        child = context.Process(
            target=run_answer, args=(path, source, printed, limit, sender), daemon=True
        )
        child.start()
        sender.close()
        try:
            count = len(properties.PROPERTIES)
            states, lost = listen(receiver, count, time.monotonic() + limit)
        finally:
            end(child)
        text = ""
        if Path(printed).exists():
            text = Path(printed).read_text(encoding="utf-8", errors="replace")
    if not lost and len(states) < len(properties.PROPERTIES):
        lost = f"the process ended by itself (exit code {child.exitcode}): a crash, or os._exit"
    results = []
    for index, item in enumerate(properties.PROPERTIES):
        state, message = states.get(index, ("wrong", f"  {lost}".replace("LIMIT", f"{limit:g}")))
        results.append(Result(item.name, item.points, state, message))
    return results, text


def end(child: BaseProcess) -> None:
    """Stop a child, and what it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # there are no groups, or it has not made its own yet
        child.kill()
    child.join()


def listen(
    receiver: Connection, count: int, deadline: float
) -> tuple[dict[int, tuple[str, str]], str]:
    """What a child sends until all `count` properties are tried, it ends, or its time is over.

    Returns: {index of a property: (state, message)}; why some are missing, if it is known.
    """
    states, index = {}, 0
    while len(states) < count:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            return states, "it did not end within LIMIT s: an endless loop? A busy machine?"
        try:
            word, content = receiver.recv()
        except (EOFError, OSError):
            return states, ""
        if word == "unloaded":
            return states, content
        if word == "began":
            index = content
        else:
            states[index] = (word, content)
    return states, ""


# ------------------------------------------------------------------------------------ what is shown


def lines_of(number: int, results: list[Result], printed: str) -> list[str]:
    """What a student reads."""
    title = answer_path(number).stem.partition("_")[2].replace("_", " ")
    most, score = most_of(results), score_of(results)
    if all(r.state == "not started" for r in results):
        return [f"exercise {number}, {title}: not started (0 of {most} points)"]
    lines = [f"exercise {number}, {title}: {score} of {most} points"]
    told = ""
    for r in results:
        lines.append(
            f"  {r.state:12} {r.name} ({r.points if r.state == 'passed' else 0}/{r.points})"
        )
        if r.message and r.state != "not started":
            same = r.message == told
            lines += ["      as above"] if same else ["    " + x for x in r.message.splitlines()]
            told = r.message
    if text := printed.strip():
        some = text.splitlines()
        shown = ("".join(filter(str.isprintable, x[:100].expandtabs())) for x in some[:10])
        lines += ["  it printed:", *("    " + line for line in shown)]
        lines += [f"    ... {len(some) - 10} lines more"] if len(some) > 10 else []
    return lines


def score_of(results: list[Result]) -> int:
    """Points that were earned."""
    return sum(r.points for r in results if r.state == "passed")


def most_of(results: list[Result]) -> int:
    """Points that can be earned."""
    return sum(r.points for r in results)


def report_of(checked: dict[int, list[Result]]) -> dict:
    """What autograders read: an entry a property, and the sum."""
    tests = [
        {
            "number": f"{number}.{index}",
            "name": f"exercise {number}: {r.name}",
            "score": r.points if r.state == "passed" else 0,
            "max_score": r.points,
            "status": "passed" if r.state == "passed" else "failed",
            "output": output_of(r),
        }
        for number, results in checked.items()
        for index, r in enumerate(results, 1)
    ]
    return {"score": sum(test["score"] for test in tests), "tests": tests}


def output_of(result: Result) -> str:
    """The lines of a message, all of them from the left margin; the state where there is none."""
    told = "" if result.state == "not started" else textwrap.dedent(result.message).strip()
    return told or result.state


def main(argv: list[str] | None = None) -> int:
    """Check what is asked for, print and report it.

    Returns: 0 where every property holds, else 1.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exercise", choices=[*map(str, NUMBERS), "all"], metavar="exercise")
    parser.add_argument("--file", type=Path, help="the answer, where it lies elsewhere")
    parser.add_argument("--checks", type=Path, help="a folder of other properties")
    parser.add_argument("--report", type=Path, help="write the results as JSON")
    given = parser.parse_args(argv)
    if given.exercise == "all" and given.file:
        parser.error("--file is the answer to one exercise: give its number")
    numbers = NUMBERS if given.exercise == "all" else [int(given.exercise)]
    if given.file and not given.file.is_file():
        what = "it is a folder" if given.file.is_dir() else "no such file"
        parser.error(f"--file {given.file}: {what}")
    if given.report and (given.report.is_dir() or not given.report.absolute().parent.is_dir()):
        what = "it is a folder" if given.report.is_dir() else "its folder does not exist"
        parser.error(f"--report {given.report}: {what}")
    for number in numbers if given.checks else []:
        if not (given.checks / f"ex{number:02}.py").is_file():
            parser.error(f"--checks {given.checks} has no ex{number:02}.py")
    torch.set_num_threads(1)  # before a fork
    with contextlib.suppress(AttributeError):  # not every terminal can show what was printed
        sys.stdout.reconfigure(errors="replace")
    checked = {}
    for number in numbers:
        results, printed = check(number, given.file, given.checks)
        checked[number] = results
        print("\n".join(lines_of(number, results, printed)), flush=True)
    if len(checked) > 1:
        earned, most = sum(map(score_of, checked.values())), sum(map(most_of, checked.values()))
        print(f"all exercises: {earned} of {most} points")
    if given.report:
        given.report.write_text(json.dumps(report_of(checked), indent=1) + "\n")
    return int(any(r.state != "passed" for results in checked.values() for r in results))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
    except BrokenPipeError:  # whoever read the lines, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
