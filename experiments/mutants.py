"""Does a wrong edit fail a test? python -m experiments.mutants [words of a name or a file]

tests/mutants.txt lists wrong edits of the sources, a paragraph each: the file and what is wrong,
the lines that the edit takes away (-) and those that it puts in their place (+). What it takes away
occurs once in the file, and may be a part of a line. Each edit is made in a copy of the project,
where the tests of its room run until one fails. The exit status is 1 where an edit survives, which
no test notices, and 2 where the tests fail without one.

    python -m experiments.mutants               all of them, half an hour on two cores
    python -m experiments.mutants frontier.py   those of a file
    python -m experiments.mutants KTO           those of a name
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "mutants.txt"
PARTS = ("harness", "experiments", "tests", "pyproject.toml")  # of a copy, beside its *.py
# The tests that a file's mutants meet; those of other files meet their own alone.
TESTS = {
    "pool.py": "pool train pretrained",
    "pretrained.py": "pretrained export",
    "reference.py": "reference pretrained",
    "data.py": "data pretrained",
    "run.py": "run pretrained",
    "train.py": "train run",
    "config.py": "config run",
    "command_line.py": "config run by_hand",
}
TESTS |= dict.fromkeys(["formats.py", "records.py", "files.py"], "formats files containers")
TESTS["containers.py"] = "containers formats files"
AT_ONCE, LONGEST = 2, 600  # copies; seconds until a copy's tests are stopped


class Mutant(NamedTuple):
    """A wrong edit: `old` occurs once in `file`, and `new` takes its place."""

    file: str
    name: str
    old: str
    new: str


class Outcome(NamedTuple):
    """What the tests say of a copy."""

    passed: bool
    seconds: float
    said: str  # the first failure, in short; of tests that pass nothing


def read_mutants(text: str) -> list[Mutant]:
    """The mutants of a list, and a check that each can be made.

    Raises: ValueError where a paragraph is none, or its old text does not occur once.

    >>> read_mutants("dro.py: half the loss\\n-0.5 * residuals.var\\n+residuals.var\\n")[0].name
    'half the loss'
    """
    mutants = []
    for paragraph in filter(None, map(str.strip, text.split("\n\n"))):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        file, _, name = lines[0].partition(": ")
        old, new = ("\n".join(x[1:] for x in lines[1:] if x[0] == sign) for sign in "-+")
        count = (ROOT / file).read_text().count(old) if old else 0
        if count != 1 or old == new:
            raise ValueError(f"{lines[0]}: its old text occurs {count} times, expected once")
        mutants.append(Mutant(file, name, old, new))
    return mutants


def tests_of(file: str) -> list[str]:
    """The tests of a file's room, the fastest first."""
    path = Path(file)
    names = ["by_hand", *TESTS.get(path.name, path.stem).split()]
    paths = [f"tests/test_{name}.py" for name in names]
    return [path for path in paths if (ROOT / path).exists()]


def run_tests(files: list[str], mutant: Mutant | None = None) -> Outcome:
    """Run test files in a new copy of the project, with an edit or without one."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for path in [*ROOT.glob("*.py"), *(ROOT / part for part in PARTS)]:
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, copy / path.name, ignore=ignored)
            else:
                shutil.copy(path, copy)
        if mutant:
            target = copy / mutant.file
            target.write_text(target.read_text().replace(mutant.old, mutant.new))
        options = ["-x", "-q", "--durations=0", "--durations-min=1000", "-p", "no:cacheprovider"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", *options, *files]
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, time.time() - began, f"no end after {LONGEST} s")
    lines = (done.stdout + done.stderr).splitlines()
    said = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 1, 2):  # neither passed nor failed: pytest itself went wrong
        said = lines[-1:]
    return Outcome(done.returncode == 0, time.time() - began, said[0][:100] if said else "")


def main(words: str = "") -> int:
    """Try the mutants whose file or name has these words. Returns: the exit status."""
    mutants = [x for x in read_mutants(LIST.read_text()) if words in f"{x.file}: {x.name}"]
    rooms = sorted({tuple(tests_of(mutant.file)) for mutant in mutants})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for files, outcome in zip(rooms, pool.map(run_tests, map(list, rooms))):
            if not outcome.passed:
                print(f"the tests fail without an edit: {' '.join(files)}\n  {outcome.said}")
                return 2
        survived, began = 0, time.time()
        outcomes = pool.map(lambda mutant: run_tests(tests_of(mutant.file), mutant), mutants)
        for mutant, outcome in zip(mutants, outcomes):
            survived += outcome.passed
            verdict = "SURVIVED" if outcome.passed else "killed"
            test = outcome.said.partition("::")[2].partition(" ")[0] or outcome.said
            title = f"{mutant.file}: {mutant.name}"
            print(f"{verdict:8} {outcome.seconds:5.0f} s  {title}  {test}".rstrip(), flush=True)
    minutes = (time.time() - began) / 60
    print(f"{len(mutants)} mutants: {len(mutants) - survived} killed, {survived} survived", end="")
    print(f" ({minutes:.0f} min)")
    return int(survived > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="of a name or a file; all mutants without them")
    sys.exit(main(" ".join(parser.parse_args().words)))
