"""What a Record is made of: fields of a row, numbers, conversations.

    {"prompt": str, "responses": [str, ...], "rewards": [float, ...]}

The readers of formats.py take rows apart with these; what they can't read ends in a DataError,
which is one line.
"""

import json
from typing import Any


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


class MissingField(DataError):
    """A field that every object of a format has is not there."""


class Unusable(Exception):
    """An object is right and teaches nothing here, for this reason."""


class Cell(str):
    """A field of a .csv, where text may mean a number, a truth value or a list."""


# ---------------------------------------------------------------------------------- fields of a row


def get(row: dict, names: str, kind: type = object) -> Any:
    """The first field of "query|prompt" that the row has, which is to be of this kind."""
    for name in names.split("|"):
        if name in row:
            return row[name] if kind is object else of_kind(kind, row[name], f"'{name}'")
    raise MissingField(f"no field {names.replace('|', ' or ')}")


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
        names = {str: "a string", list: "a list", dict: "an object"}
        raise DataError(f"{where} is {type(value).__name__}, expected {names[kind]}")
    return value


def number(value: Any, where: str) -> float:
    """A finite number; up to 1e30, because it is squared in float32."""
    if isinstance(value, Cell):
        try:
            value = float(value)
        except ValueError:
            pass
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 1e30:
        raise DataError(f"{where} is {short(repr(value))}, expected a finite number (up to 1e30)")
    return float(value)


def numbers(values: Any, where: str) -> list[float]:
    return [
        number(value, f"{where} {i}") for i, value in enumerate(of_kind(list, values, where), 1)
    ]


# ------------------------------------------------------------------------------------ conversations

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
USER, ASSISTANT = {"user", "human", "prompter"}, {"assistant", "gpt", "model", "bot", "chatbot"}


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
        who = of_kind(str, get(of_kind(dict, turn, "a turn"), "role|from"), "'role'").lower()
        words = get(turn, "content|value|text")
        if isinstance(words, list):  # [{"type": "text", "text": ...}, ...]
            words = "".join(str(part.get("text", "")) for part in words if isinstance(part, dict))
        who = "user" if who in USER else "assistant" if who in ASSISTANT else who
        turns.append((who, of_kind(str, words, "'content'")))
    return turns


def seam(prompt: Any, reply: Any) -> tuple[str, str]:
    """Prompt and response of a prompt and a reply, each a string or a conversation.

    Of a conversation the last turn is the response, and all before it is prompt.
    """
    if isinstance(prompt, str) and isinstance(reply, str):
        return prompt, reply
    *before, (who, response) = turns_of(reply, "assistant") or [("nobody", "")]
    if who != "assistant":
        raise Unusable("the last turn is not the assistant's")
    # A reply may be the whole conversation, which begins with the prompt.
    context = turns_of(prompt, "user")
    if not (before and (isinstance(prompt, str) or before[: len(context)] == context)):
        before = context + before
    if not before:
        raise Unusable("a reply without a question")
    return render(before) + f"\n\n{SPEAKERS['assistant']}:", " " + response.lstrip()


def one_list(prompt: Any, replies: list, rewards: list[float]) -> dict:
    """The Record of replies to a prompt; each may be a string or a conversation."""
    if len(replies) != len(rewards):
        raise DataError(
            f"{len(replies)} responses and {len(rewards)} rewards, expected as many rewards as "
            "responses"
        )
    if isinstance(prompt, str) and all(isinstance(reply, str) for reply in replies):
        return {"prompt": prompt, "responses": replies, "rewards": rewards}
    if not isinstance(prompt, (str, list, dict)):
        raise DataError(f"the prompt is {type(prompt).__name__}, expected a string")
    for i, reply in enumerate(replies, 1):
        if not isinstance(reply, (str, list, dict)):
            raise DataError(f"response {i} is {type(reply).__name__}, expected a string")
    pairs = [seam(prompt, reply) for reply in replies] or [seam(prompt, "")]
    if len({before for before, _ in pairs}) > 1:
        raise Unusable("the responses differ before the last turn")
    return one_list(pairs[0][0], [response for _, response in pairs][: len(replies)], rewards)
