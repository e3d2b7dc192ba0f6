"""What a Record is made of: fields of a row, numbers, conversations, lists.

    {"prompt": str, "responses": [str, ...], "rewards": [float, ...]}

The readers of formats.py take rows apart with these; what they can't read ends in a DataError,
which is one line.
"""

import json
import math
import re
from typing import Any


def short(value: object, most: int = 80) -> str:
    """A value as a message shows it: on one line, and of a long one the beginning and the end."""
    text = " ".join(str(value).splitlines())
    if len(text) <= most:
        return text
    return f"{text[: most - most // 2]} ... {text[-(most // 2 - 5) :]}"  # 5 for the dots


class DataError(ValueError):
    """Something is wrong with the data; the message, one line, names file and line."""

    def __init__(self, message: str) -> None:
        super().__init__(short(message, 300))


def fault(path: str, line: int, cause: object) -> DataError:
    """The error "FILE:LINE: cause": of a cause at most 200 characters, of a path what is left."""
    text = f":{line}: {short(cause, 200)}"
    return DataError(short(path, 300 - len(text)) + text)


class MissingField(DataError):
    """A field that every object of a format has is not there."""


class Unusable(Exception):
    """An object is right and teaches nothing here, for this reason."""


class Cell(str):
    """A field of a .csv, where text may mean a number, a truth value or a list."""


# ---------------------------------------------------------------------------------- fields of a row


def name_of(row: dict, names: str) -> str:
    """The first name of "prompt|query" that the row has."""
    if names in row:  # a single one
        return names
    for name in names.split("|"):
        if name in row:
            return name
    raise MissingField(f"no field {' or '.join(map(repr, names.split('|')))}")


def get(row: dict, names: str, kind: type = object) -> Any:
    """The field of the first of these names that the row has, which is to be of this kind."""
    name = name_of(row, names)
    return row[name] if kind is object else of_kind(kind, row[name], f"'{name}'")


def get_number(row: dict, names: str) -> float:
    """As `get`, of a finite number."""
    name = name_of(row, names)
    return number(row[name], f"'{name}'")


def objects(row: dict, name: str) -> list[dict]:
    """The objects of the list in this field."""
    return [
        of_kind(dict, value, f"'{name}' {i}") for i, value in enumerate(get(row, name, list), 1)
    ]


def of_kind(kind: type, value: Any, where: str) -> Any:
    """The value, which is to be of this kind; a Cell may hold it as JSON."""
    if isinstance(value, Cell) and kind is not str:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    if not isinstance(value, kind):
        expected = {str: "a string", list: "a list", dict: "an object"}[kind]
        if isinstance(value, Cell):
            raise DataError(f"{where} is {short(repr(value), 60)}, expected {expected} as JSON")
        raise DataError(f"{where} is {type(value).__name__}, expected {expected}")
    return value


def is_number(value: Any) -> bool:
    """Is it a finite number? Up to 1e30, because it is squared in float32."""
    return isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= 1e30


def as_number(value: Any) -> Any:
    """The value, or the number that a Cell holds as text."""
    try:
        return float(value) if isinstance(value, Cell) else value
    except ValueError:
        return value


def number(value: Any, where: str) -> float:
    """A finite number, as `is_number`; a Cell may hold it as text."""
    value = as_number(value)
    if not is_number(value):
        raise DataError(f"{where} is {short(repr(value))}, expected a finite number (up to 1e30)")
    return float(value)


NUMBERS = frozenset({float, int})


def plain_numbers(values: list) -> list[float] | None:
    """The values as floats where all of them are finite numbers, else None; quick."""
    if not NUMBERS.issuperset(map(type, values)):
        return None
    try:
        values = list(map(float, values))
    except OverflowError:  # an integer of 400 digits
        return None
    return values if math.hypot(*values) <= 1e30 else None  # nan is not


def numbers(values: list, where: str) -> list[float]:
    """Finite numbers, as `number`; a message says which is none."""
    plain = plain_numbers(values)
    if plain is not None:
        return plain
    return [number(value, f"{where} {i}") for i, value in enumerate(values, 1)]


# ------------------------------------------------------------------------------------ conversations

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
ROLES = {"human": "user", "prompter": "user"}  # other names of them
ROLES |= dict.fromkeys(["gpt", "model", "bot", "chatbot"], "assistant")
TURN = "\n\nAssistant:"  # the turn of a response, as `render` writes it

# What comes before the turn of a response in other people's transcripts.
TURNS = (
    r"\s(?:Assistant|AI|Bot):|<\|assistant\|>\n?|<\|im_start\|>assistant\n|\[/INST\]|### Response:"
)


def render(turns: list[tuple[str, str]]) -> str:
    """A conversation as text, (speaker, words) by turn: the form of Anthropic HH. Yours to change.

    >>> render([("system", "Be brief."), ("user", "Is the pond calm?")])
    '\\n\\nSystem: Be brief.\\n\\nHuman: Is the pond calm?'
    """
    return "".join(f"\n\n{SPEAKERS.get(who, who)}: {words}" for who, words in turns)


def turns_of(value: Any, speaker: str) -> list[tuple[str, str]]:
    """The turns of a conversation: {role, content} or {from, value} each; a string is one turn.

    Args: speaker: who says a string.
    """
    if isinstance(value, str):
        return [(speaker, value)]
    turns = []
    for turn in [value] if isinstance(value, dict) else of_kind(list, value, "a conversation"):
        who = get(of_kind(dict, turn, "a turn"), "role|from", str).lower()
        words = get(turn, "content|value|text")
        if isinstance(words, list):  # [{"type": "text", "text": ...}, ...]
            words = "".join(str(part.get("text", "")) for part in words if isinstance(part, dict))
        turns.append(
            (ROLES.get(who, who), of_kind(str, "" if words is None else words, "'content'"))
        )
    return turns


def seam(prompt: Any, reply: Any) -> tuple[str, str]:
    """Prompt and response of a prompt and a reply, each a string or a conversation.

    Of a conversation the last turn is the response, and all before it is prompt.
    """
    *before, (who, response) = turns_of(reply, "assistant") or [("nobody", "")]
    if who != "assistant":
        raise Unusable("the last turn is not the assistant's")
    # A reply may be the whole conversation, which begins with the prompt.
    context = turns_of(prompt, "user")
    is_whole = before and (isinstance(prompt, str) or before[: len(context)] == context)
    turns = before if is_whole else context + before
    if not turns:
        raise Unusable("a reply without a question")
    return render(turns) + TURN, " " + response.lstrip()


def common_start(first: str, second: str) -> int:
    """How far two transcripts share their prompt: to the last turn that both begin, or a word."""
    same = 0
    for a, b in zip(first, second):
        if a != b:
            break
        same += 1
    turns = [found.end() for found in re.finditer(TURNS, first[:same])]
    return turns[-1] if turns else 1 + max(first.rfind(" ", 0, same), first.rfind("\n", 0, same))


# -------------------------------------------------------------------------------------------- lists

BOTH = "have scores and a label: the scores count"


TEXTS = frozenset({str, Cell})


def plain_record(row: dict) -> dict | None:
    """The Record of a row in our names or RRHF's, with nothing to mend or to leave out; else None.

    Quick, as most rows of a large file are one: all else goes the long way.
    """
    prompt, responses = row.get("prompt", row.get("query")), row.get("responses")
    rewards = row.get("rewards", row.get("scores"))
    if not (type(prompt) is str and type(responses) is list and type(rewards) is list):
        return None
    try:
        "".join([prompt, *responses]).encode()  # strings without lone surrogates
    except (TypeError, UnicodeEncodeError):
        return None
    rewards = plain_numbers(rewards)
    if not rewards or len(responses) != len(rewards):
        return None
    if not (prompt.strip() and all(map(str.strip, responses))):
        return None
    return {"prompt": prompt, "responses": responses, "rewards": rewards}


def one_list(prompt: Any, replies: list, rewards: list[float]) -> dict:
    """The Record of replies to a prompt; each may be a string or a conversation."""
    if len(replies) != len(rewards):
        raise DataError(
            f"{len(replies)} responses and {len(rewards)} rewards, expected as many rewards as "
            "responses"
        )
    if TEXTS.issuperset(map(type, [prompt, *replies])):
        # str makes plain strings of Cells.
        return {"prompt": str(prompt), "responses": list(map(str, replies)), "rewards": rewards}
    if not isinstance(prompt, (str, list, dict)):
        raise DataError(f"the prompt is {type(prompt).__name__}, expected a string")
    for i, reply in enumerate(replies, 1):
        if not isinstance(reply, (str, list, dict)):
            raise DataError(f"response {i} is {type(reply).__name__}, expected a string")
    pairs = [seam(prompt, reply) for reply in replies]
    prompts = {before for before, _ in pairs}  # none where there is no reply
    if len(prompts) > 1:
        raise Unusable("the responses differ before the last turn")
    return one_list("".join(prompts), [response for _, response in pairs], rewards)


def one_pair(prompt: Any, chosen: Any, rejected: Any, scores: tuple | None = None) -> dict:
    """The Record of a pair: its scores where they differ, else 1 for the chosen and 0."""
    record = one_list(prompt, [chosen, rejected], [1.0, 0.0])
    if scores is None:
        return record
    if None in scores:
        return record | {"note": "lack a score: the chosen earns 1, the rejected 0"}
    given = [number(score, f"score {i}") for i, score in enumerate(scores, 1)]
    if given[0] == given[1]:
        return record | {"note": "have equal scores: the chosen earns 1, the rejected 0"}
    return record | {"rewards": given, "note": BOTH}


def one_single(prompt: Any, reply: Any, reward: float | None, label: Any = None) -> dict:
    """The Record of a response with a reward, a label or both; files.py settles which counts."""
    record = one_list(prompt, [reply], [0.0 if reward is None else reward])
    if label is not None or reward is None:
        record |= {"label": label, "scored": reward is not None}
    return record


def thumb(label: Any, threshold: float | None) -> float:
    """1 for thumbs up, -1 for down: of true and false, 1 and 0, or numbers above `threshold`."""
    if isinstance(label, Cell):
        label = {"true": True, "false": False}.get(label.strip().lower(), as_number(label))
    if not isinstance(label, bool):
        if not isinstance(label, (int, float)):
            raise DataError(f"the label is {short(repr(label))}, expected true or false, or 1 or 0")
        label = number(label, "the label")
        if threshold is not None:
            label = label > threshold
        elif label not in (0, 1):
            raise DataError(
                f"the label is {label:g}, expected true or false, 1 or 0; with other numbers "
                "--threshold X says where thumbs are up: above X"
            )
    return 1.0 if label else -1.0


def grouped(records: list[dict]) -> list[dict]:
    """One list a prompt, in the order of first appearance."""
    lists: dict[str, dict] = {}
    for record in records:
        first = lists.setdefault(record["prompt"], record)
        if first is not record:
            first["responses"] += record["responses"]
            first["rewards"] += record["rewards"]
    return list(lists.values())


def size(records: list[dict]) -> str:
    """How many prompts and responses, and lists where there are more of those than of prompts."""
    prompts = len({record["prompt"] for record in records})
    lists = f"{len(records)} lists of " if len(records) > prompts else ""
    return f"{lists}{prompts} prompts, {sum(len(r['responses']) for r in records)} responses"


def best_of(record: dict) -> str:
    """Which response of the first record is taken for the best, so that a wrong sign is seen."""
    best = max(record["rewards"])
    text = short(repr(record["responses"][record["rewards"].index(best)]), 60)
    if len(record["responses"]) == 1:
        return f"record 1: {text} earns {best:g}"
    return f"best of record 1: {text}"
