"""Containers of preference data: a file, or standard input, as rows.

.jsonl, .json (an array, or objects one after another, or an object around an array), .csv with a
header, each of these also as .gz, and .parquet where pyarrow is installed; `-` is standard input.
What can't be read ends in a DataError that says what it is, and the way out.
"""

import contextlib
import csv
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from formats import CANONICAL, FORMATS
from records import Cell, DataError, fault, short


def rows(path: str) -> Iterator[tuple[int, dict]]:
    """(line, object) of every row of a file; DataError where it can't be read."""
    try:
        with opened(path) as file:
            for line, row in READERS[container(path, file)](path, file):
                if not isinstance(row, dict):
                    name = type(row).__name__
                    raise fault(path, line, f"{name} instead of an object, expected {CANONICAL}")
                yield line, row
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as e:  # ValueError: a NUL in a path
        reason = getattr(e, "strerror", None) or e
        raise fault(path, 1, f"{reason}, expected a readable file") from None


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, or of standard input for -, decompressed where they are gzip."""
    if path == "-":
        yield unzipped(sys.stdin.buffer, False)
        return
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith(ENDINGS)
    if (is_name or "://" in path) and not os.path.lexists(path):
        raise fault(
            path,
            1,
            "no such file; a dataset of a hub is downloaded first, as .jsonl or .parquet files, "
            "whose paths go here",
        )
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise fault(path, 1, f"a folder, expected files, as {short(path, 120)}/*.jsonl")
    if not stat.S_ISREG(mode):
        raise fault(path, 1, "a pipe or a device, expected a file; - is standard input")
    with open(path, "rb") as file:
        yield unzipped(file, path.endswith(".gz"))


def unzipped(file: BinaryIO, named_gz: bool) -> BinaryIO:
    """The file, or what is compressed in it."""
    if named_gz or file.peek(2).startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    return file


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
UNREAD = {  # how files begin that are something else, and what to do
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"PK\x03\x04": "a zip or a spreadsheet: unpack it, or save it as .csv",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it, or compress it with gzip",
    b"BZh": "compressed with bzip2: unpack it, or compress it with gzip",
    b"\xfd7zXZ": "compressed with xz: unpack it, or compress it with gzip",
    b"ARROW1": "an Arrow file: save it as .parquet or .jsonl",
    b"<": "a web page or XML: download the file itself",
}


def container(path: str, file: BinaryIO) -> str:
    """How the rows are stored: a key of READERS. Refuses what it can't be, with the way out."""
    head = file.peek(4096)[:4096]
    if head.startswith(b"PAR1"):
        return "parquet"
    for start, what in UNREAD.items():
        if head.startswith(start):
            raise fault(path, 1, what)
    # UTF-16 without a mark: every other byte of Latin letters is a zero.
    zeros = [half for half in (head[:40:2], head[1:40:2]) if half and not half.strip(b"\0")]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros:
        raise fault(path, 1, f"UTF-16, not UTF-8: {convert('UTF-16')}")
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    text = head.removeprefix(BOM).lstrip()
    begin = text[:1]
    if suffix in (".csv", ".tsv") or (path == "-" and begin not in (b"{", b"[", b"")):
        return "csv"
    is_spread = text.partition(b"\n")[0].strip() == b"{"  # an object over several lines
    return "json" if suffix == ".json" or begin == b"[" or is_spread else "jsonl"


def convert(name: str) -> str:
    return f"convert it, iconv -f {name} -t UTF-8 OLD > NEW"


BOM = b"\xef\xbb\xbf"  # the mark that some editors begin UTF-8 with


def text_lines(path: str, file: BinaryIO) -> Iterator[str]:
    """Lines of UTF-8 text; other encodings are named."""
    line = 0
    try:
        for line, data in enumerate(file, 1):
            yield data.decode() if line > 1 else data.removeprefix(BOM).decode()
    except UnicodeDecodeError as e:
        # Accents of Latin-1 stand alone among letters, the bytes of a Chinese text in rows.
        runs = re.findall(rb"[\x80-\xff]+", e.object)
        name = "GBK" if 2 * sum(len(run) > 1 for run in runs) > len(runs) else "Latin-1"
        raise fault(
            path,
            line,
            f"byte {e.start} is not UTF-8, expected UTF-8 text: it may be {name}; {convert(name)}",
        ) from None


def jsonl_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """An object a line."""
    for line, text in enumerate(text_lines(path, file), 1):
        try:
            yield line, parse(text)
        except (ValueError, RecursionError) as e:
            if not text.isspace():
                raise not_json(path, line, e, "one object a line, or a table named .csv") from None


SCAN = json.JSONDecoder().scan_once


def parse(text: str) -> Any:
    """json.loads, without the time that it spends on white space."""
    try:
        value, end = SCAN(text, 0)
    except StopIteration:
        return json.loads(text)
    return value if text[end:] in ("", "\n", "\r\n") else json.loads(text)


def json_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The items of an array, or objects one after another, over any number of lines."""
    text = "".join(text_lines(path, file))
    decoder, at, line, counted = json.JSONDecoder(), _space(text, 0), 1, 0
    is_array, first = text.startswith("[", at), True
    at = _space(text, at + is_array)
    while at < len(text) and not (is_array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise not_json(path, line, e, "an array of objects") from None
        at = _space(text, at)
        if is_array and text.startswith(",", at):
            at = _space(text, at + 1)
        elif is_array and at < len(text) and text[at] != "]":
            raise fault(path, line, "not JSON: no comma or ] after this object")
        alone = first and not is_array and at == len(text)
        yield from ((line, row) for row in (_inner(value) if alone else [value]))
        first = False
    if is_array and at == len(text):
        raise fault(path, line, "not JSON: the array does not end")


SPACE = re.compile(r"[ \t\r\n]*")


def _space(text: str, at: int) -> int:
    """The index after white space."""
    return SPACE.match(text, at).end()


def _inner(value: Any) -> list:
    """The rows of a value: itself, or what the one list in an object around them holds."""
    if isinstance(value, dict) and not any(kind.fits(value) for kind in FORMATS.values()):
        lists = [x for x in value.values() if isinstance(x, list) and x and type(x[0]) is dict]
        if len(lists) == 1:
            return lists[0]
    return [value]


def not_json(path: str, line: int, error: Exception, expected: str) -> DataError:
    return fault(path, line, f"not JSON ({getattr(error, 'msg', error)}), expected {expected}")


def csv_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, dict]]:
    """A table with a header; commas, semicolons or tabs. Its fields are Cells."""
    csv.field_size_limit(sys.maxsize)
    lines = text_lines(path, file)
    head = next(lines, "")
    delimiter = max(",;\t", key=head.count)
    table = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(table, [])]
        if twice := [name for name, n in Counter(header).items() if n > 1]:
            raise fault(path, 1, f"the header names {short(repr(twice[0]))} twice")
        for cells in table:
            if cells and len(cells) != len(header):
                has = f"{len(cells)} fields, and the header names {len(header)}"
                raise fault(path, table.line_num, has)
            if cells:
                yield table.line_num, dict(zip(header, map(Cell, cells)))
    except csv.Error as e:
        raise fault(path, table.line_num, f"not CSV ({e}), expected a table") from None


def parquet_rows(path: str, file: BinaryIO) -> Iterator[tuple[int, dict]]:
    """Rows of a parquet file, counted from 1; needs pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise fault(path, 1, "a parquet file, which needs pyarrow: pip install pyarrow") from None
    line = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                line += 1
                yield line, {name: value for name, value in row.items() if value is not None}
    except pyarrow.ArrowException as e:
        raise fault(path, line + 1, f"{e}, expected a readable parquet file") from None


READERS = {"jsonl": jsonl_rows, "json": json_rows, "csv": csv_rows, "parquet": parquet_rows}
