"""What an answer may not do: fill disk or memory, change a program of the course, read an answer.

It stops slips and first ideas. It is no sandbox: whoever wants out gets out, by way of another
process for instance.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # on Windows
    resource = None

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE, MEMORY = 2**26, 2**32  # bytes that an answer may print or save, and hold
CHANGES = ("os.remove", "os.rename", "os.truncate", "shutil.rmtree")  # as Python's audit has them


class Refused(PermissionError):
    """An answer's line reaches for a file that it has to leave alone."""


def is_inside(module: str, names: tuple[str, ...]) -> bool:
    """Is a module, in dotted words, one of those or inside one?"""
    return any(f"{module}.".startswith(f"{name}.") for name in names)


def module_of(file: Path) -> str:
    """A file of the repository in dotted words, a compiled one too; empty where it is no module."""
    if ROOT not in file.parents or file.suffix not in (".py", ".pyc"):
        return ""
    words = [x.split(".")[0] for x in file.relative_to(ROOT).parts if x != "__pycache__"]
    return ".".join(words)


def set_limits() -> None:
    """For the rest of the process: LARGEST_FILE, and on Linux MEMORY more than it has now."""
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    with contextlib.suppress(OSError):  # /proc is on Linux alone
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def fence(answer: Path, checks: Path, forbidden: tuple[str, ...]) -> None:
    """For the rest of the process, in what an answer's lines call: Refused at a file of the course.

    Args: answer: the student's file; checks: the folder of the properties, which may lie elsewhere;
        forbidden: modules that hold the answer, in dotted words.
    """

    def look_at(event: str, given: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        frame = sys._getframe()
        while frame and frame.f_code.co_filename != str(answer):
            frame = frame.f_back
        if not frame:
            return  # the checks and the project's own runs may open what they like
        named = [x for x in given[:2] if isinstance(x, (str, bytes, Path))]
        for file in (Path(os.fsdecode(x)).resolve() for x in named):
            if event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR):
                if is_inside(module_of(file), forbidden):
                    raise Refused(f"reads {file.name}, where the answer stands: write it here")
            elif is_program(file, checks) or event == "shutil.rmtree" and ROOT in file.parents:
                raise Refused(f"changes {file.name}, a file of the course: leave it as it is")

    sys.addaudithook(look_at)


def is_program(file: Path, checks: Path) -> bool:
    """Is a file a part of the course, one that decides what others get?"""
    return file.suffix == ".py" and (ROOT in file.parents or checks in file.parents)
