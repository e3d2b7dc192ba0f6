"""Files of preference data: opened, recognised, read into Records.

    load(["lists.jsonl"]) -> Records    {"prompt": str, "responses": [str, ...],
                                         "rewards": [float, ...]}

Containers: .jsonl, .json (an array, or objects one after another), .csv with a header, each of
these also as .gz, and .parquet where pyarrow is installed; `-` is standard input, a pattern like
data/*.jsonl stands for all that it matches. The format is recognised from the first row of a file,
one of formats.FORMATS. A bad row ends the reading with a DataError, "FILE:LINE: what is wrong, what
was expected".
"""

import contextlib
import csv
import functools
import gc
import glob
import gzip
import io
import itertools
import json
import os
import re
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from formats import CANONICAL, FORMATS, Format, nearest
from records import Cell, DataError, MissingField, Unusable, number, short


def load(
    paths: list[str],
    limit: int = 0,
    say: Callable[[str], None] = print,
    format: str = "",
    threshold: float | None = None,
) -> list[dict]:
    """Read preference data, in any container above and any format of FORMATS.

    What is right but of no use (an empty response, a tie) is left out and counted.

    Args: paths: files, patterns or -, read in this order; limit: the first so many lists (0: all);
        say: takes lines of news; format: its name, or NAME:FIELD to take the rewards from FIELD;
        empty: recognised from the first row; threshold: a label is thumbs up above it; without it
        labels are true and false, or 1 and 0.
    Returns: Records.
    Raises: DataError("FILE:LINE: what is wrong, what was expected"); also where more than 5 % of
        the rows have no prompt or no response.
    """
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
                raise DataError(f"{path}:1: no file matches this pattern")
            yield from matches
        else:
            yield path


@dataclass
class Reading:
    """What has been read of a file."""

    records: list[dict] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # where each record stands
    blank: list[int] = field(default_factory=list)  # lines without a prompt or a response
    left_out: Counter = field(default_factory=Counter)  # reason -> rows
    notes: Counter = field(default_factory=Counter)  # what is said of how many records
    labels: bool = False  # are there any?

    def add(self, record: dict, line: int, threshold: float | None) -> None:
        """Keep a record, without its empty responses."""
        if "note" in record:
            self.notes[record.pop("note")] += 1
        if "labels" in record:
            self.labels = True
            record["rewards"] = [thumb(label, threshold) for label in record.pop("labels")]
        texts = [record["prompt"], *record["responses"]]
        if not all(text.isascii() for text in texts):
            # Lone surrogates, legal in JSON and in nothing else, become question marks.
            clean = [text.encode("utf-8", "replace").decode() for text in texts]
            record["prompt"], record["responses"] = clean[0], clean[1:]
        empty = [not text.strip() for text in record["responses"]]
        if any(empty):
            kept = [j for j, is_empty in enumerate(empty) if not is_empty]
            self.left_out["an empty response"] += len(empty) - len(kept)
            for name in ("responses", "rewards"):
                record[name] = [record[name][j] for j in kept]
        if record["responses"] and record["prompt"].strip():
            self.records.append(record)
            self.lines.append(line)
        else:
            self.blank.append(line)


def load_file(
    path: str,
    limit: int,
    say: Callable[[str], None],
    format: str = "",
    threshold: float | None = None,
) -> list[dict]:
    """Records of one file; as `load`."""
    (asked, _, reward), kind, line = format.partition(":"), None, 0
    reading, messages = Reading(), []
    for line, row in rows(path):
        # Rows of one prompt may stand anywhere in a file: they are grouped before they are cut.
        if limit and len(reading.records) >= limit and not kind.grouped:
            break
        try:
            if kind is None:
                kind = FORMATS[asked or recognise(row)]
                read = functools.partial(kind.read, reward=reward) if reward else kind.read
            found = read(row)
            if kind.gather:
                messages.append(found)
            elif isinstance(found, list):
                for record in found:
                    reading.add(record, line, threshold)
            else:
                reading.add(found, line, threshold)
        except Unusable as e:
            reading.left_out[str(e)] += 1
        except DataError as e:
            raise DataError(f"{path}:{line}: {e}{hint(e, kind, row)}") from None
    for record in kind.gather(messages) if messages else ():
        reading.add(record, line, threshold)
    if kind is None:
        raise DataError(f"{path}:{max(line, 1)}: no record, expected {CANONICAL}")
    if threshold is not None and not reading.labels:
        raise DataError(f"{path}:1: --threshold is for labels, and {kind.title} have none")
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
            raise DataError(
                f"{path}:{reading.blank[0]}: more than 5 % of the records are unusable, expected "
                "text in prompt and responses"
            )
    if not reading.records:
        raise DataError(f"{path}:1: nothing is left: {'; '.join(reading.left_out)}")
    records = grouped(reading.records)[: limit or None] if kind.grouped else reading.records
    first = records[0]
    best = first["responses"][first["rewards"].index(max(first["rewards"]))]
    responses = sum(len(record["responses"]) for record in records)
    prompts = len({record["prompt"] for record in records})
    lists = f"{len(records)} lists of " if len(records) > prompts else ""
    say(
        f"{path}: {kind.title}, {lists}{prompts} prompts, {responses} responses; best of record 1: "
        f"{best[:60]!r}"
    )
    return records


def thumb(label: Any, threshold: float | None) -> float:
    """1 for thumbs up, -1 for down: of true and false, 1 and 0, or numbers above `threshold`."""
    if isinstance(label, Cell) and label.strip().lower() in ("true", "false"):
        return 1.0 if label.strip().lower() == "true" else -1.0
    if not isinstance(label, bool):
        if not isinstance(label, (int, float, Cell)):
            raise DataError(f"'label' is {short(repr(label))}, expected true or false")
        label = number(label, "'label'")
        if threshold is not None:
            label = label > threshold
        elif label not in (0, 1):
            raise DataError(
                f"'label' is {label:g}, expected true or false, 1 or 0; with other numbers "
                "--threshold X says where thumbs are up: above X"
            )
    return 1.0 if label else -1.0


def grouped(records: list[dict]) -> list[dict]:
    """One list a prompt, in the order of first appearance."""
    lists: dict[str, dict] = {}
    for record in records:
        empty = {"prompt": record["prompt"], "responses": [], "rewards": []}
        group = lists.setdefault(record["prompt"], empty)
        group["responses"] += record["responses"]
        group["rewards"] += record["rewards"]
    return list(lists.values())


# ----------------------------------------------------------------------------- which format it is


def asked_format(format: str) -> str:
    """Why --format NAME or NAME:FIELD can't be; empty where it can."""
    name, colon, reward = format.partition(":")
    if name not in FORMATS:
        return f"expected one of {', '.join(FORMATS)}"
    if colon and not (FORMATS[name].reward and reward):
        others = ", ".join(name for name, kind in FORMATS.items() if kind.reward)
        return f"a field of the rewards can be told for {others}, as helpsteer:verbosity"
    return ""


def recognise(row: dict) -> str:
    """The name of the format that this first row of a file is of."""
    for name, kind in FORMATS.items():
        if kind.fits(row):
            return name
    near = FORMATS[nearest(row)]
    raise DataError(
        f"fields {short(', '.join(row), 60)} are of no known format; nearest: {near.title} "
        f"({expected(near)}); ours is {CANONICAL}"
    )


def expected(kind: Format) -> str:
    """The fields of a format, as a message names them."""
    return short(", ".join(kind.fields.split()).replace("|", " or "), 100)


def hint(error: DataError, kind: Format | None, row: dict) -> str:
    """What else a message says where a field is missing."""
    if kind is None or not isinstance(error, MissingField):
        return ""
    others = [other.title for other in FORMATS.values() if other is not kind and other.fits(row)]
    if others and not kind.fits(row):
        return f": the file began with {kind.title}, and this is one of {others[0]}"
    return f", expected {expected(kind)}"


# --------------------------------------------------------------------------------------- containers


def rows(path: str) -> Iterator[tuple[int, dict]]:
    """(line, object) of every row of a file; DataError where it can't be read."""
    try:
        with opened(path) as file:
            kind = container(path, file)
            for line, row in READERS[kind](path, file):
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}:{line}: {type(row).__name__} instead of an object, expected "
                        f"{CANONICAL}"
                    )
                yield line, row
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(f"{path}:1: {reason}, expected a readable file") from None


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, or of standard input for -, decompressed where they are gzip."""
    if path == "-":
        yield unzipped(sys.stdin.buffer, False)
        return
    if not os.path.lexists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise DataError(
            f"{path}:1: no such file; if this is a dataset of a hub, download its .jsonl or "
            ".parquet files first and give their paths"
        )
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}:1: a folder, expected files: give {short(path)}/*.jsonl")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}:1: a pipe or a device, expected a file; - is standard input")
    with open(path, "rb") as file:
        yield unzipped(file, path.endswith(".gz"))


def unzipped(file: BinaryIO, named_gz: bool) -> BinaryIO:
    """The file, or what is compressed in it."""
    if named_gz or file.peek(2).startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    return file


def container(path: str, file: BinaryIO) -> str:
    """How the rows are stored: a key of READERS. Refuses what it can't be, with the way out."""
    head = file.peek(4096)[:4096]
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}:1: a Git LFS pointer, not the data: run git lfs pull")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}:1: a zip or spreadsheet file, expected .jsonl, .json or .csv")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[:20:2].strip(b"\0") == b"" != head[:20]:
        raise DataError(f"{path}:1: UTF-16, not UTF-8: {convert('UTF-16')}")
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix == ".csv" or (path == "-" and begin not in (b"{", b"[", b"")):
        return "csv"
    return "json" if suffix == ".json" or begin == b"[" else "jsonl"


def convert(name: str) -> str:
    return f"convert it, iconv -f {name} -t UTF-8 OLD > NEW"


def text_lines(path: str, file: BinaryIO) -> Iterator[str]:
    """Lines of UTF-8 text; other encodings are named."""
    for line, data in enumerate(file, 1):
        try:
            yield data.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as e:
            name = "Latin-1"
            with contextlib.suppress(UnicodeDecodeError):
                name = "GBK" if data.decode("gbk") else name
            raise DataError(
                f"{path}:{line}: byte {e.start} is not UTF-8, expected UTF-8 text: it may be "
                f"{name}; {convert(name)}"
            ) from None


def jsonl_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """An object a line."""
    for line, text in enumerate(text_lines(path, file), 1):
        if text and not text.isspace():
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as e:
                raise not_json(path, line, e, "one object a line") from None


def json_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The items of an array, or objects one after another, over any number of lines."""
    text = "".join(text_lines(path, file))
    decoder, at, line, counted = json.JSONDecoder(), _space(text, 0), 1, 0
    is_array = text.startswith("[", at)
    at = _space(text, at + is_array)
    while at < len(text) and not (is_array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise not_json(path, line, e, "an array of objects") from None
        yield from ((line, row) for row in _inner(value))
        at = _space(text, at)
        if is_array and text.startswith(",", at):
            at = _space(text, at + 1)
        elif is_array and not text.startswith("]", at):
            raise DataError(f"{path}:{line}: not JSON: no comma or ] after this object")
    if is_array and at == len(text):
        raise DataError(f"{path}:{line}: not JSON: the array does not end")


def _space(text: str, at: int) -> int:
    """The index after white space."""
    return re.compile(r"[ \t\r\n]*").match(text, at).end()


def _inner(value: Any) -> list:
    """The rows of a value: itself, or what the one list in an object around them holds."""
    if isinstance(value, dict) and not any(kind.fits(value) for kind in FORMATS.values()):
        lists = [x for x in value.values() if isinstance(x, list) and x and type(x[0]) is dict]
        if len(lists) == 1:
            return lists[0]
    return [value]


def not_json(path: str, line: int, e: Exception, expected: str) -> DataError:
    return DataError(f"{path}:{line}: not JSON ({getattr(e, 'msg', e)}), expected {expected}")


def csv_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, dict]]:
    """A table with a header; commas, semicolons or tabs. Its fields are Cells."""
    csv.field_size_limit(sys.maxsize)
    lines = text_lines(path, file)
    head = next(lines, "")
    delimiter = max(",;\t", key=head.count)
    table = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        for cells in table:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}:{table.line_num}: {len(cells)} fields, and the header names "
                    f"{len(header)}"
                )
            if cells:
                yield table.line_num, dict(zip(header, map(Cell, cells)))
    except csv.Error as e:
        raise DataError(f"{path}:{table.line_num}: not CSV ({e}), expected a table") from None


def parquet_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, dict]]:
    """Rows of a parquet file, counted from 1; needs pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}:1: a parquet file, which needs pyarrow: pip install pyarrow"
        ) from None
    line = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except pyarrow.ArrowException as e:
        raise DataError(f"{path}:{line + 1}: {e}, expected a readable parquet file") from None


READERS = {"jsonl": jsonl_rows, "json": json_rows, "csv": csv_rows, "parquet": parquet_rows}
