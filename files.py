"""Files of preference data, read into Records.

    load(["lists.jsonl"]) -> Records    {"prompt": str, "responses": [str, ...],
                                         "rewards": [float, ...]}

containers.py opens a file, its first row says which of formats.FORMATS it is, whose reader makes
Records of its rows. A bad row ends the reading with a DataError, "FILE:LINE: what is wrong, what
was expected"; what is right but of no use is counted.
"""

import difflib
import functools
import gc
import glob
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from containers import rows
from formats import CANONICAL, FORMATS, Format
from records import (
    BOTH,
    DataError,
    MissingField,
    Unusable,
    best_of,
    fault,
    grouped,
    plain_record,
    short,
    size,
    thumb,
)


def load(
    paths: list[str],
    limit: int = 0,
    say: Callable[[str], None] = print,
    format: str = "",
    threshold: float | None = None,
) -> list[dict]:
    """Read preference data, in any container of containers.py and any format of FORMATS.

    What is right but of no use (an empty response, a tie) is left out and counted.

    Args: paths: files, patterns or -, read in this order; limit: the first so many lists (0: all);
        say: takes lines of news; format: its name, or NAME:FIELD to take the rewards from FIELD;
        empty: recognised from the first row; threshold: a label is thumbs up above it; without it
        labels are true and false, or 1 and 0.
    Returns: Records.
    Raises: DataError("FILE:LINE: what is wrong, what was expected"); also where more than 5 % of
        the rows have no prompt or no response.
    """
    if format and (reason := asked_format(format)):
        raise DataError(f"format {short(format)}: {reason}")
    records = []
    collecting = gc.isenabled()
    gc.disable()  # nothing here is garbage, and looking for it takes as long as reading
    try:
        for path in expanded(paths):
            if limit and len(records) >= limit:
                break
            left = limit - len(records) if limit else 0
            records += load_file(path, left, say, format, threshold)
    finally:
        if collecting:
            gc.enable()
    return records


def expanded(paths: list[str]) -> Iterator[str]:
    """The paths, with all that a pattern matches in its place."""
    for path in map(str, paths):
        if glob.has_magic(path) and not os.path.exists(path):
            matches = sorted(glob.glob(path))
            if not matches:
                raise fault(path, 1, "no file matches this pattern")
            yield from matches
        else:
            yield path


@dataclass
class Reading:
    """What has been read of a file."""

    threshold: float | None
    records: list[dict] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # where each record stands
    blank: list[int] = field(default_factory=list)  # lines without a prompt or a response
    left_out: Counter = field(default_factory=Counter)  # reason -> rows
    notes: Counter = field(default_factory=Counter)  # what is said of how many records
    labelled: list[tuple] = field(default_factory=list)  # (record, label, line), scored as well
    labels: bool = False  # does any record have its reward from one?

    def add(self, record: dict, line: int) -> None:
        """Keep a record, without its empty responses."""
        if len(record) > 3:
            self.note(record, line)
        texts = [record["prompt"], *record["responses"]]
        if not all(map(str.isascii, texts)):
            # Lone surrogates, legal in JSON and in nothing else, become question marks.
            texts = [text.encode("utf-8", "replace").decode() for text in texts]
            record["prompt"], record["responses"] = texts[0], texts[1:]
        if len(texts) > 1 and all(map(str.strip, texts)):
            self.keep(record, line)
            return
        kept = [j for j, text in enumerate(record["responses"]) if text.strip()]
        if not kept or not record["prompt"].strip():
            self.blank.append(line)
            return
        if empty := len(record["responses"]) - len(kept):
            self.left_out["an empty response"] += empty
            for name in ("responses", "rewards"):
                record[name] = [record[name][j] for j in kept]
        self.keep(record, line)

    def keep(self, record: dict, line: int) -> None:
        self.records.append(record)
        self.lines.append(line)

    def note(self, record: dict, line: int) -> None:
        """Take off a record what is no part of one: a note, a label."""
        if "note" in record:
            self.notes[record.pop("note")] += 1
        if "label" in record:
            label, scored = record.pop("label"), record.pop("scored")
            if scored:
                self.labelled.append((record, label, line))
            else:
                self.labels = True
                record["rewards"] = [thumb(label, self.threshold)]

    def settle(self, path: str) -> None:
        """Of responses with a score and a label the scores count where they differ, or the labels.

        Raises: DataError.
        """
        if len({record["rewards"][0] for record, _, _ in self.labelled}) > 1:
            self.notes[BOTH] += len(self.labelled)
            return
        for record, label, line in self.labelled:
            self.labels = True
            self.notes["have a label, and scores that are all equal: the labels count"] += 1
            try:
                record["rewards"] = [thumb(label, self.threshold)]
            except DataError as e:
                raise fault(path, line, e) from None


def watched(path: str) -> Iterator[tuple[int, dict]]:
    """The rows of a file; on a terminal their number is shown while a large one is read."""
    if not sys.stderr.isatty():
        yield from rows(path)
        return
    number = 0
    for number, row in enumerate(rows(path), 1):
        if number % 50_000 == 0:
            print(f"\r{short(path, 60)}: {number:,} rows", end="", file=sys.stderr, flush=True)
        yield row
    if number >= 50_000:
        print("\r\x1b[K", end="", file=sys.stderr)  # the line is empty again


def load_file(
    path: str,
    limit: int,
    say: Callable[[str], None],
    format: str = "",
    threshold: float | None = None,
) -> list[dict]:
    """Records of one file; as `load`."""
    name, _, reward = format.partition(":")
    kind, line, reading = None, 0, Reading(threshold)
    gathered, lines = [], []  # what `kind.gather` is handed, and where it stands
    for line, row in watched(path):
        try:
            if kind is None:
                kind = FORMATS[name or recognise(row)]
                read = functools.partial(kind.read, reward=reward) if reward else kind.read
            if kind.is_ours and (record := plain_record(row)):
                reading.keep(record, line)
            elif kind.gather:
                gathered.append(read(row))
                lines.append(line)
            else:
                found = read(row)
                for record in found if isinstance(found, list) else [found]:
                    reading.add(record, line)
        except Unusable as e:
            reading.left_out[str(e)] += 1
        except DataError as e:
            raise fault(path, line, f"{e}{hint(e, kind, row, name)}") from None
        # Rows of one list may stand anywhere in a file: they are put together before they are cut.
        if limit and len(reading.records) >= limit and not kind.grouped:
            break
    if kind is None:
        raise fault(path, max(line, 1), f"no record, expected {CANONICAL}")
    for index, record in kind.gather(gathered) if kind.gather else ():
        reading.add(record, lines[index])
    reading.settle(path)
    if threshold is not None and not reading.labels:
        raise fault(path, 1, f"--threshold is for labels, and {kind.title} here have none")
    return report(path, kind, reading, limit, say)


def report(path: str, kind: Format, reading: Reading, limit: int, say: Callable) -> list[dict]:
    """Say what was read and what was not. Returns: the Records, grouped where that is due."""
    total = len(reading.records) + len(reading.blank)
    for reason, n in reading.left_out.items():
        say(f"{path}: left out {n} times: {reason}")
    for note, n in reading.notes.items():
        say(f"{path}: {n} of {total} records {note}")
    if reading.blank:
        lines = ", ".join(map(str, reading.blank[:5])) + " ..." * (len(reading.blank) > 5)
        say(
            f"{path}: {len(reading.blank)} of {total} records dropped: empty prompt or response "
            f"(lines {lines})"
        )
        if len(reading.blank) > 0.05 * total:
            reason = "more than 5 % of the records are unusable, expected text in prompt and "
            raise fault(path, reading.blank[0], reason + "responses")
    if not reading.records:
        raise fault(path, 1, f"nothing is left: {'; '.join(reading.left_out) or 'no list'}")
    for line, reward, away, n in far_away(reading):
        say(
            f"{path}:{line}: reward {reward:g} ({n} of them) is {away:.0f} deviations away from "
            "the others: where it stands for no score, take it out, as it flattens the others"
        )
    records = grouped(reading.records) if kind.grouped else reading.records
    records = records[: limit or None]
    if limit and (kind.grouped or kind.gather):
        say(f"{path}: read whole for --limit: what belongs to a list may stand anywhere in it")
    say(f"{path}: {kind.title}, {size(records)}; {best_of(records[0])}")
    return records


def far_away(reading: Reading) -> Iterator[tuple[int, float, float, int]]:
    """The lowest and the highest reward, where it stands alone: a -999 in place of a score.

    Yields: (line, reward, its distance in deviations of the others, how many there are) where that
    is more than 20, and the others have three values at least.
    """
    lists = [record["rewards"] for record in reading.records]
    rewards = np.fromiter(itertools.chain.from_iterable(lists), float)
    for reward in sorted({rewards.min(), rewards.max()}):
        others = rewards[rewards != reward]
        if len(others) < 3:
            continue
        distance, deviation = abs(reward - others.mean()), others.std()
        if distance > 20 * deviation and len(np.unique(others)) > 2:
            index = next(i for i, row in enumerate(lists) if reward in row)
            n = len(rewards) - len(others)
            yield reading.lines[index], float(reward), float(distance / deviation), n


# ----------------------------------------------------------------------------- which format it is


def asked_format(format: str) -> str:
    """Why --format NAME or NAME:FIELD can't be; empty where it can."""
    name, colon, reward = format.partition(":")
    if name not in FORMATS:
        near = difflib.get_close_matches(name[:40].lower(), FORMATS, 3, 0)
        return f"no format of this name, nearest are {', '.join(near)}; docs/data.md has them all"
    if colon and not (FORMATS[name].reward and reward):
        others = ", ".join(name for name, kind in FORMATS.items() if kind.reward)
        return f"a field of the rewards can be told for {others}, as helpsteer:verbosity"
    return ""


def recognise(row: dict) -> str:
    """The name of the format that this first row of a file is of."""
    for name, kind in FORMATS.items():
        if kind.fits(row):
            return name
    raise DataError(
        f"fields {short(', '.join(row), 45)} are of no known format; nearest is {nearest(row)}; "
        f"ours is {CANONICAL}"
    )


def nearest(row: dict) -> str:
    """The name of the format whose fields are most like those of an object that fits none."""
    names = [name[:40].lower() for name in row][:50]

    def alike(field: str) -> float:
        """1 where a name is the field's, little where it is misspelt, 0 where it is another."""
        words = field.lower().split("|")
        if not set(words).isdisjoint(names):
            return 1.0
        slips = [word for word in words if difflib.get_close_matches(word, names, 1, 0.8)]
        return 0.3 if slips else 0.0

    def likeness(name: str) -> float:
        fields = FORMATS[name].fields.split()
        return sum(map(alike, fields)) / max(len(fields), len(names))

    best = max(reversed(FORMATS), key=likeness)
    return best if likeness(best) else "canonical"


def hint(error: DataError, kind: Format | None, row: dict, asked: str) -> str:
    """What else a message says where a field of the row is missing; `asked`: --format's name."""
    if kind is None or not isinstance(error, MissingField) or kind.fits(row):
        return ""
    others = [other.title for other in FORMATS.values() if other.fits(row)]
    if others:
        began = "--format says" if asked else "the file began with"
        return f": {began} {kind.title}, and this is one of {others[0]}"
    return f", expected {short(', '.join(kind.fields.split()).replace('|', ' or '), 100)}"
