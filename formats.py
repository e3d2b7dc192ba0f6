"""Preference data as people have it, read into Records: a reader and a row of FORMATS for each.

    load(["lists.jsonl"]) -> Records    {"prompt": str, "responses": [str, ...],
                                         "rewards": [float, ...]}

The format of a file is recognised from its first record. A bad line ends the reading with a
DataError, "FILE:LINE: what is wrong, what was expected". A new format is one reader, from an object
of the file to a Record, and one row.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple


def short(value: object, most: int = 80) -> str:
    """A value as a message shows it: on one line, and of a long one the beginning and the end."""
    text = " ".join(str(value).splitlines())
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... {text[5 - most // 2 :]}"


class DataError(ValueError):
    """Something is wrong with the data; the message, one line, names file and line."""

    def __init__(self, message: str) -> None:
        super().__init__(short(message, 300))


def load(paths: list[str], limit: int = 0, say: Callable[[str], None] = print) -> list[dict]:
    """Read preference data: .jsonl or .jsonl.gz, in any format of FORMATS.

    Records that are well-formed but unusable (an empty prompt or response) are dropped and counted.

    Args: paths: files, read in this order; limit: keep the first so many lists (0: all);
        say: takes lines of news.
    Returns: Records.
    Raises: DataError("FILE:LINE: what is wrong, what was expected"), or above 5 % unusable records.
    """
    records = []
    for path in paths:
        if limit and len(records) >= limit:
            break
        records += load_file(path, limit - len(records) if limit else 0, say)
    return records


def load_file(path: str, limit: int, say: Callable[[str], None]) -> list[dict]:
    """Records of one file; as `load`."""
    records, dropped, number, kind = [], [], 0, None
    for number, line in enumerate(_lines(path), 1):
        # Rows of one prompt may stand anywhere in the file: they are grouped before they are cut.
        if limit and len(records) >= limit and not (kind and kind.grouped):
            break
        if not line.strip():
            continue
        try:
            row = _object(line)
            kind = kind or next(k for k in FORMATS.values() if k.fits(row))
            record = _plain(kind.read(row))
        except DataError as e:
            raise DataError(f"{path}:{number}: {e}") from None
        usable = record["responses"] and all(text.strip() for text in record["responses"])
        if record["prompt"].strip() and usable:
            records.append(record)
        else:
            dropped.append(number)
    if not records and not dropped:
        raise DataError(f"{path}:{max(number, 1)}: no record, expected {CANONICAL}")
    if dropped:
        _check_dropped(path, dropped, len(records) + len(dropped), say)
    if kind.grouped:
        records = _grouped(records)[: limit or None]
    first = records[0]
    best = first["responses"][first["rewards"].index(max(first["rewards"]))]
    responses = sum(len(record["responses"]) for record in records)
    say(
        f"{path}: {kind.title}, {len(records)} prompts, {responses} responses; "
        f"best of record 1: {best[:60]!r}"
    )
    return records


def _check_dropped(path, dropped: list[int], total: int, say) -> None:
    """Say which records were dropped; above 5 % the file is refused."""
    lines = ", ".join(map(str, dropped[:5])) + (" ..." if len(dropped) > 5 else "")
    say(
        f"{path}: {len(dropped)} of {total} records dropped: empty prompt or response "
        f"(lines {lines})"
    )
    if len(dropped) > 0.05 * total:
        raise DataError(
            f"{path}:{dropped[0]}: more than 5 % of the records are unusable, expected text in "
            "prompt and responses"
        )


def _lines(path) -> Iterator[str]:
    """Text lines of a file, decompressed if its name ends in .gz; DataError if it can't be read."""
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as e:
                    raise DataError(
                        f"{path}:{number}: byte {e.start} is not UTF-8, expected UTF-8 text"
                    ) from None
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(
            f"{path}:1: {reason}, expected a readable .jsonl or .jsonl.gz file"
        ) from None


def _object(line: str) -> dict:
    """The JSON object of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"not JSON ({getattr(e, 'msg', e)}), expected one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{type(row).__name__} instead of an object, expected {CANONICAL}")
    return row


def _plain(record: dict) -> dict:
    """Lone surrogates, legal in JSON and in nothing else, become question marks."""
    clean = lambda text: text.encode("utf-8", "replace").decode()
    responses = [clean(text) for text in record["responses"]]
    return record | {"prompt": clean(record["prompt"]), "responses": responses}


def _grouped(records: list[dict]) -> list[dict]:
    """One list a prompt, in the order of first appearance."""
    lists = {}
    for record in records:
        empty = {"prompt": record["prompt"], "responses": [], "rewards": []}
        group = lists.setdefault(record["prompt"], empty)
        group["responses"] += record["responses"]
        group["rewards"] += record["rewards"]
    return list(lists.values())


# ---------------------------------------------------------------------------- readers, one a format


def _field(row: dict, name: str, kind, expected: str, form: str):
    """row[name], which is to be of this kind; `form` is what a whole row looks like."""
    if name not in row:
        raise DataError(f"no field {name!r}, expected {form}")
    if not isinstance(row[name], kind):
        raise DataError(f"{name!r} is {type(row[name]).__name__}, expected {expected}")
    return row[name]


def _number(value, where: str) -> float:
    """A finite number; up to 1e30, because it is squared in float32."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 1e30:
        raise DataError(f"{where} is {short(repr(value))}, expected a finite number (up to 1e30)")
    return float(value)


CANONICAL = '{"prompt": str, "responses": [str, ...], "rewards": [number, ...]}'


def read_canonical(row: dict) -> dict:
    """The Record itself."""
    prompt = _field(row, "prompt", str, "a string", CANONICAL)
    responses = _field(row, "responses", list, "a list of strings", CANONICAL)
    rewards = _field(row, "rewards", list, "a list of numbers", CANONICAL)
    if not all(isinstance(text, str) for text in responses):
        raise DataError("'responses' holds something else than strings, expected a list of strings")
    if len(responses) != len(rewards):
        raise DataError(
            f"{len(responses)} responses and {len(rewards)} rewards, expected as many rewards as "
            "responses"
        )
    rewards = [_number(reward, f"reward {i}") for i, reward in enumerate(rewards, 1)]
    return {"prompt": prompt, "responses": responses, "rewards": rewards}


SINGLE = (
    '{"prompt": str, "response": str, "reward": number}, or "label": true or false for the reward'
)


def read_single(row: dict) -> dict:
    """One response: `response` or `completion`, with `reward`, `score` or `rating`, or a `label`.

    A label is a thumb: true, or a number above 0, is up and earns 1; the others earn -1.
    """
    answer = "response" if "response" in row or "completion" not in row else "completion"
    scores = [name for name in ("reward", "score", "rating") if name in row]
    if scores or "label" not in row:
        name = scores[0] if scores else "reward"
        reward = _number(_field(row, name, object, "a number", SINGLE), f"{name!r}")
    else:
        reward = 1.0 if _thumb_up(row["label"]) else -1.0
    text = _field(row, answer, str, "a string", SINGLE)
    prompt = _field(row, "prompt", str, "a string", SINGLE)
    return {"prompt": prompt, "responses": [text], "rewards": [reward]}


def _thumb_up(label) -> bool:
    if isinstance(label, bool):
        return label
    if not isinstance(label, (int, float)):
        raise DataError(
            f"'label' is {short(repr(label))}, expected true or false, or a number (thumbs up "
            "above 0)"
        )
    return _number(label, "'label'") > 0


COPA = (
    '{"p": str, "asks-for": "cause" or "effect", "a1": str, "a2": str, '
    '"most-plausible-alternative": 1 or 2, "human-explanations": [...]}'
)
EXPLANATION = '{"text": str, "filtered-avg-rating": number}'


def read_copa(row: dict) -> dict:
    """COPA-SSE (Brassard et al. 2022): a question with its right answer; rated explanations.

    The prompt is the premise, Why? or So what?, and the right answer.
    """
    asks = _field(row, "asks-for", str, '"cause" or "effect"', COPA)
    if asks not in ("cause", "effect"):
        raise DataError(f'\'asks-for\' is {short(repr(asks))}, expected "cause" or "effect"')
    right = str(_field(row, "most-plausible-alternative", (str, int), "1 or 2", COPA))
    if right not in ("1", "2"):
        raise DataError(f"'most-plausible-alternative' is {short(repr(right))}, expected 1 or 2")
    question = "Why?" if asks == "cause" else "So what?"
    rated = _field(row, "human-explanations", list, "a list of explanations", COPA)
    if not all(isinstance(explanation, dict) for explanation in rated):
        raise DataError(
            "'human-explanations' holds something else than objects, expected explanations"
        )
    premise = _field(row, "p", str, "a string", COPA)
    answer = _field(row, f"a{right}", str, "a string", COPA)
    rating = "filtered-avg-rating"
    return {
        "prompt": f"{premise} {question} {answer}",
        "responses": [_field(e, "text", str, "a string", EXPLANATION) for e in rated],
        "rewards": [
            _number(e.get(rating), f"{rating} of explanation {i}") for i, e in enumerate(rated, 1)
        ],
    }


class Format(NamedTuple):
    """How a file is recognised and read."""

    read: Callable[[dict], dict]  # an object of the file -> a Record
    fits: Callable[[dict], bool]  # is the first object of this format?
    title: str  # what `load` says it has recognised
    grouped: bool = False  # rows of one prompt become one list


FORMATS = {  # the first row that fits
    "copa-sse": Format(read_copa, lambda row: "human-explanations" in row, "COPA-SSE lists"),
    "single": Format(
        read_single,
        lambda row: "responses" not in row and bool({"response", "completion"} & set(row)),
        "single responses",
        grouped=True,
    ),
    "canonical": Format(read_canonical, lambda row: True, "canonical lists"),
}
