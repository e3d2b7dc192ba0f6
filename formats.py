"""The formats of preference data that people have: a reader and a row of FORMATS for each.

A reader takes one object of a file and gives a Record, or several:

    {"prompt": str, "responses": [str, ...], "rewards": [float, ...]}

What it can't read ends the reading with a DataError; what is right but of no use here is Unusable,
left out and counted. A new format is one reader and one row. files.py opens the files and adds
their names and lines; `python formats.py` prints the table of docs/data.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from records import (
    TURN,
    Cell,
    DataError,
    MissingField,
    Unusable,
    common_start,
    get,
    get_number,
    name_of,
    number,
    numbers,
    objects,
    of_kind,
    one_list,
    one_pair,
    one_single,
    short,
)

PROMPT = "prompt|query|instruction|question"
PROMPTS = frozenset(PROMPT.split("|"))
REPLY, SCORE = "response|completion|answer|output", "reward|score|rating"

# -------------------------------------------------------------------------------------------- lists


def _asked(row: dict) -> Any:
    """The prompt; `input` belongs to an instruction, as in alpaca's formats."""
    if row.get("input") and name_of(row, PROMPT) == "instruction":
        return _instruction(row)
    return get(row, PROMPT)


def read_canonical(row: dict) -> dict:
    """The Record itself, also in the names of RRHF and of LIRE's authors."""
    prompt, responses = _asked(row), get(row, "responses", list)
    return one_list(prompt, responses, numbers(get(row, "rewards|scores", list), "reward"))


def read_nested(row: dict) -> dict:
    """Responses that hold their own rewards."""
    answers = objects(row, "responses")
    texts = [get(answer, "text|response|content") for answer in answers]
    rewards = [get_number(answer, SCORE) for answer in answers]
    return one_list(_asked(row), texts, rewards)


def read_ranks(row: dict) -> dict:
    """Ranks in place of rewards, the lowest is best."""
    ranks = numbers(get(row, "ranks", list), "rank")
    responses = get(row, "responses", list)
    return one_list(_asked(row), responses, [-rank for rank in ranks])


def read_pro(row: dict) -> dict:
    """PRO: the prompt stands before every response."""
    prefixes = get(row, "prefix", list)
    if not prefixes or any(prefix != prefixes[0] for prefix in prefixes):
        raise DataError("'prefix' holds different prompts, expected one, repeated")
    rewards = numbers(get(row, "reward", list), "reward")
    return one_list(prefixes[0], get(row, "suffix", list), rewards)


def read_nectar(row: dict) -> dict:
    """Nectar (Zhu et al. 2023): seven answers by rank, 1 is best."""
    answers = objects(row, "answers")
    rewards = [-get_number(answer, "rank") for answer in answers]
    return one_list(get(row, PROMPT), [get(answer, "answer") for answer in answers], rewards)


def read_ultrafeedback(row: dict, reward: str = "") -> dict:
    """UltraFeedback (Cui et al. 2023): the fine-grained score, or the mean rating of all aspects.

    `overall_score` is wrong in about 2,000 completions: it says 10 where 1 is meant.
    """
    responses, rewards = [], []
    for completion in objects(row, "completions"):
        score = None if reward else completion.get("fine-grained_score")
        if score is None:
            notes = get({"annotations": {}} | completion, "annotations", dict)
            some = [name for name in notes if reward in ("", name)]
            ratings = [get(notes, name, dict).get("Rating") for name in some]
            known = [number(Cell(r), "'Rating'") for r in ratings if r not in ("N/A", None, "")]
            score = sum(known) / len(known) if known else None
        if score is not None:
            responses.append(get(completion, "response"))
            rewards.append(number(score, "'fine-grained_score'"))
    if not responses:
        raise Unusable("no completion has a rating")
    return one_list(get(row, "instruction"), responses, rewards)


def read_copa(row: dict) -> dict:
    """COPA-SSE (Brassard et al. 2022): a question with its right answer; rated explanations.

    The prompt is the premise, Why? or So what?, and the right answer.
    """
    asks = get(row, "asks-for", str)
    if asks not in ("cause", "effect"):
        raise DataError(f'\'asks-for\' is {short(repr(asks))}, expected "cause" or "effect"')
    right = str(get(row, "most-plausible-alternative"))
    if right not in ("1", "2"):
        raise DataError(f"'most-plausible-alternative' is {short(repr(right))}, expected 1 or 2")
    question = "Why?" if asks == "cause" else "So what?"
    prompt = f"{get(row, 'p', str)} {question} {get(row, f'a{right}', str)}"
    rated = objects(row, "human-explanations")
    name = "filtered-avg-rating"
    rewards = [number(x.get(name), f"{name} of explanation {i}") for i, x in enumerate(rated, 1)]
    return one_list(prompt, [get(x, "text", str) for x in rated], rewards)


def read_tree(row: dict) -> list[dict]:
    """OpenAssistant's trees (Köpf et al. 2023): a list for every turn of the assistant.

    Rank 0 is best; replies without one are left aside.
    """
    records = []
    todo = [([], get(row, "prompt", dict))]  # turns before a message, and it
    while todo:
        before, message = todo.pop()
        replies = objects({"replies": message.get("replies") or []}, "replies")
        who = "assistant" if message.get("role") == "assistant" else "user"
        turns = [*before, _turn(who, get(message, "text"))]
        if who == "user":
            records += _ranked(turns, replies)
        todo += [(turns, reply) for reply in reversed(replies)]
    if not records:
        raise Unusable("no two replies with ranks")
    return records


def read_message(row: dict) -> dict:
    """A message of OpenAssistant's flat export: no Record yet, `gather_messages` makes them."""
    message = {name: get(row, name, str) for name in ("message_id", "text")}
    parent, rank = row.get("parent_id"), row.get("rank")
    message["parent_id"] = None if parent is None else of_kind(str, parent, "'parent_id'")
    message["rank"] = None if rank is None else number(rank, "'rank'")
    return message | {"role": "assistant" if get(row, "role") == "assistant" else "user"}


def gather_messages(messages: list[dict]) -> list[tuple[int, dict]]:
    """A list for every message of the user, with the conversation before it; any order.

    Returns: (index of that message, Record).
    """
    by_id = {message["message_id"]: message for message in messages}
    replies: dict = {}
    for message in messages:
        replies.setdefault(message["parent_id"], []).append(message)
    records = []
    for index, message in enumerate(messages):
        if message["role"] == "user" and len(replies.get(message["message_id"], [])) > 1:
            turns, turn = [], message
            while turn is not None and len(turns) < 1000:  # a circle is not followed for ever
                turns.append(_turn(turn["role"], turn["text"]))
                turn = by_id.get(turn["parent_id"])
            found = _ranked(turns[::-1], replies[message["message_id"]])
            records += [(index, record) for record in found]
    return records


def _ranked(turns: list[dict], replies: list[dict]) -> list[dict]:
    """The Record of the assistant's ranked replies to a conversation, if there are two."""
    ranked = [r for r in replies if r.get("rank") is not None and r.get("role") == "assistant"]
    if len(ranked) < 2:
        return []
    rewards = [-get_number(reply, "rank") for reply in ranked]
    return [one_list(turns, [get(reply, "text", str) for reply in ranked], rewards)]


# -------------------------------------------------------------------------------------------- pairs


def read_preference(row: dict) -> dict:
    """TRL's pairs: strings or conversations; without a prompt it is what both begin with."""
    chosen, rejected = get(row, "chosen"), get(row, "rejected")
    scores = None
    if "score_chosen" in row and "score_rejected" in row:
        scores = (row["score_chosen"], row["score_rejected"])
    if not PROMPTS.isdisjoint(row):
        prompt = get(row, PROMPT)
        if isinstance(prompt, str) and row.get("system"):
            prompt = [_turn("system", row["system"]), _turn("user", prompt)]
        return one_pair(prompt, chosen, rejected, scores)
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return one_pair([], chosen, rejected, scores)
    at = common_start(chosen, rejected)
    if not chosen[:at].strip():
        raise Unusable("no prompt, and no beginning that the two responses share")
    return one_pair(chosen[:at], chosen[at:], rejected[at:], scores)


def read_hh(row: dict) -> dict:
    """Anthropic HH (Bai et al. 2022): two transcripts; the last reply is the response."""
    (first, turn, better), (second, other_turn, worse) = (
        get(row, name, str).rpartition(TURN) for name in ("chosen", "rejected")
    )
    if not (turn and other_turn):
        raise Unusable("a transcript without a turn of the assistant")
    if first != second:
        raise Unusable("the responses differ before the last turn")
    return one_pair(first + TURN, better, worse)


def read_tldr(row: dict) -> dict:
    """Reddit TL;DR comparisons (Stiennon et al. 2020)."""
    summaries, choice = objects(row, "summaries"), get(row, "choice")
    if len(summaries) != 2 or choice not in (0, 1):
        raise DataError(f"'choice' is {short(repr(choice))}, expected 0 or 1 of two summaries")
    texts = [get(summary, "text") for summary in summaries]
    return one_list(_post(row), texts, [1.0, 0.0] if choice == 0 else [0.0, 1.0])


def _post(row: dict) -> str:
    """What is to be summarised, a post or an article, and TL;DR: after it."""
    info = get(row, "info", dict)
    if info.get("article"):
        return get(info, "article", str) + "\n\nTL;DR:"
    heads = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title")]
    above = "".join(f"{head}{info[name]}\n\n" for head, name in heads if info.get(name))
    return f"{above}POST: {get(info, 'post', str)}\n\nTL;DR:"


def read_webgpt(row: dict) -> dict:
    """WebGPT's comparisons (Nakano et al. 2021); a tie is score 0 for both."""
    question = get(row, "question")
    question = get(question, "full_text") if isinstance(question, dict) else question
    scores = [get_number(row, f"score_{i}") for i in (0, 1)]
    return one_list(question, [get(row, "answer_0"), get(row, "answer_1")], scores)


def read_shp(row: dict) -> dict:
    """SHP (Ethayarajh et al. 2022): labels 1 means that A is better; scores are votes."""
    label = get(row, "labels")
    if label not in (0, 1, "0", "1"):
        raise DataError(f"'labels' is {short(repr(label))}, expected 1 (A is better) or 0")
    better, worse = "AB" if int(label) else "BA"
    scores = tuple(row[f"score_{x}"] for x in (better, worse) if f"score_{x}" in row)
    replies = [get(row, f"human_ref_{x}") for x in (better, worse)]
    return one_pair(get(row, "history"), *replies, scores if len(scores) == 2 else None)


def read_arena(row: dict) -> dict:
    """Chatbot Arena (Zheng et al. 2023): two conversations and who won."""
    winner = get(row, "winner")
    if winner in ("tie", "tie (bothbad)"):
        raise Unusable("a tie")
    if winner not in ("model_a", "model_b"):
        raise DataError(f"'winner' is {short(repr(winner))}, expected model_a, model_b or tie")
    sides = [get(row, "conversation_a"), get(row, "conversation_b")]
    return one_pair([], *(sides if winner == "model_a" else sides[::-1]))


def read_helpsteer3(row: dict) -> dict:
    """HelpSteer3 (Wang et al. 2025): -3 to 3, and a negative one prefers response 1."""
    preference = get_number(row, "overall_preference")
    if not preference:
        raise Unusable("a tie")
    replies = [get(row, "response1"), get(row, "response2")]
    return one_list(get(row, "context"), replies, [-preference, 0.0])


# ------------------------------------------------------------------- single responses, rated or not


def read_single(row: dict, reward: str = SCORE) -> dict:
    """A response with its reward, and perhaps a label."""
    return one_single(_asked(row), get(row, REPLY), get_number(row, reward), row.get("label"))


def read_unpaired(row: dict) -> dict:
    """A response with thumbs up or down, TRL's unpaired preference."""
    return one_single(_asked(row), get(row, REPLY), None, get(row, "label"))


def read_scored(row: dict, reward: str = SCORE) -> dict:
    """An instruction, its output and a score."""
    return one_single(_instruction(row), get(row, "output|response"), get_number(row, reward))


def read_helpsteer(row: dict, reward: str = "helpfulness") -> dict:
    """HelpSteer (Wang et al. 2023): five marks of 0 to 4, of which helpfulness is the reward."""
    return one_single(get(row, PROMPT), get(row, "response"), get_number(row, reward))


def read_axis(row: dict, reward: str = "overall") -> dict:
    """Reddit TL;DR, one summary rated on several axes, any of which may be missing."""
    summary = get(row, "summary", dict)
    axes = get(summary, "axes", dict)
    if axes.get(reward) is None:
        raise Unusable(f"no rating of {short(reward, 40)}")
    return one_single(_post(row), get(summary, "text"), get_number(axes, reward))


def _instruction(row: dict) -> Any:
    """LLaMA-Factory's alpaca prompt: input goes below the instruction, earlier turns before it."""
    parts = [of_kind(str, row[x], f"'{x}'") for x in ("instruction", "input") if row.get(x)]
    if not parts:
        raise MissingField("no field instruction or input")
    text, turns = "\n".join(parts), []
    if row.get("system"):
        turns.append(_turn("system", row["system"]))
    for exchange in of_kind(list, row.get("history") or [], "'history'"):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise DataError("'history' holds something else than [question, reply]")
        turns += map(_turn, ("user", "assistant"), exchange)
    return [*turns, _turn("user", text)] if turns else text


def _turn(role: str, content: Any) -> dict:
    return {"role": role, "content": content}


def read_alpaca(row: dict) -> dict:
    """LLaMA-Factory's alpaca pairs."""
    return one_pair(_instruction(row), get(row, "chosen"), get(row, "rejected"))


def read_alpaca_kto(row: dict) -> dict:
    """LLaMA-Factory's alpaca form with a thumb."""
    return one_single(_instruction(row), get(row, "output"), None, get(row, "kto_tag"))


def read_sharegpt(row: dict) -> dict:
    """LLaMA-Factory's sharegpt pairs: a conversation and the two turns that may follow."""
    return one_pair(get(row, "conversations|messages"), get(row, "chosen"), get(row, "rejected"))


def read_sharegpt_kto(row: dict) -> dict:
    """LLaMA-Factory's sharegpt form with a thumb for the last turn."""
    return one_single([], get(row, "conversations|messages"), None, get(row, "kto_tag|label"))


# -------------------------------------------------------------------------------------------- table


class Format(NamedTuple):
    """How a file is recognised and read."""

    read: Callable[..., Any]  # an object of the file -> a Record, or several
    fields: str  # that its objects have; | stands between names of one field
    title: str  # what `load` says it has recognised
    becomes: str  # responses of a list, and what they earn
    also: Callable[[dict], bool] = lambda row: True  # what the fields don't say
    grouped: bool = False  # rows of one prompt become one list
    reward: str = ""  # the field of its rewards, where --format NAME:FIELD may ask for another
    is_ours: bool = False  # most rows are Records as they stand
    gather: Callable[[list], list] | None = None  # all that was read -> (index, Record) of each

    def fits(self, row: dict) -> bool:
        """Is this an object of the format?"""
        fields = [names.split("|") for names in self.fields.split()]
        return all(any(name in row for name in names) for names in fields) and self.also(row)


def _all_objects(row: dict) -> bool:
    responses = row["responses"]
    is_list = isinstance(responses, list) and responses
    return bool(is_list) and all(isinstance(x, dict) for x in responses)


def _two_transcripts(row: dict) -> bool:
    texts = [row["chosen"], row["rejected"]]
    return "prompt" not in row and all(isinstance(x, str) and TURN in x for x in texts)


CANONICAL = '{"prompt": str, "responses": [str, ...], "rewards": [number, ...]}'
SINGLES = {"becomes": "M = its rows: their rewards", "grouped": True}
THUMBS = {"becomes": "M = its rows: 1 up, -1 down", "grouped": True}
PAIR, SCORES = "M = 2: 1 and 0", "M = 2: the scores, or 1 and 0 where equal or missing"
FORMATS = {  # the first row that fits
    "copa-sse": Format(read_copa, "p asks-for human-explanations", "COPA-SSE lists", "ratings"),
    "oasst-tree": Format(
        read_tree,
        "prompt",
        "OpenAssistant trees",
        "a list a turn: -rank",
        also=lambda row: isinstance(row["prompt"], dict) and "replies" in row["prompt"],
    ),
    "oasst": Format(
        read_message,
        "message_id parent_id role text",
        "OpenAssistant messages",
        "a list a turn: -rank",
        gather=gather_messages,
    ),
    "pro": Format(read_pro, "prefix suffix reward", "PRO lists", "rewards"),
    "tldr": Format(read_tldr, "info summaries choice", "Reddit TL;DR comparisons", PAIR),
    "tldr-axis": Format(
        read_axis, "info summary", "Reddit TL;DR ratings", **SINGLES, reward="overall"
    ),
    "webgpt": Format(
        read_webgpt, "question answer_0 answer_1 score_0 score_1", "WebGPT pairs", "M = 2: scores"
    ),
    "shp": Format(read_shp, "history human_ref_A human_ref_B labels", "SHP pairs", SCORES),
    "arena": Format(read_arena, "conversation_a conversation_b winner", "Arena battles", PAIR),
    "helpsteer3": Format(
        read_helpsteer3,
        "context response1 response2 overall_preference",
        "HelpSteer3 pairs",
        "M = 2: -preference and 0",
    ),
    "helpsteer": Format(
        read_helpsteer, "prompt response helpfulness", "HelpSteer", **SINGLES, reward="helpfulness"
    ),
    "nectar": Format(read_nectar, f"{PROMPT} answers", "Nectar lists", "M = 7: -rank"),
    "ultrafeedback": Format(
        read_ultrafeedback,
        "instruction completions",
        "UltraFeedback lists",
        "M = 4: fine-grained_score, or the mean of the ratings",
        reward="fine-grained_score",
    ),
    "nested": Format(
        read_nested,
        f"{PROMPT} responses",
        "lists of scored responses",
        "rewards",
        also=_all_objects,
    ),
    "canonical": Format(
        read_canonical,
        f"{PROMPT} responses rewards|scores",
        "canonical lists",
        "rewards",
        is_ours=True,
    ),
    "ranks": Format(read_ranks, f"{PROMPT} responses ranks", "ranked lists", "-rank"),
    "sharegpt": Format(
        read_sharegpt,
        "conversations|messages chosen rejected",
        "sharegpt pairs",
        PAIR,
        also=lambda row: "prompt" not in row,
    ),
    "sharegpt-kto": Format(
        read_sharegpt_kto, "conversations|messages kto_tag|label", "sharegpt thumbs", **THUMBS
    ),
    "hh": Format(
        read_hh, "chosen rejected", "Anthropic HH transcripts", PAIR, also=_two_transcripts
    ),
    "alpaca": Format(read_alpaca, "instruction chosen rejected", "alpaca pairs", PAIR),
    "alpaca-kto": Format(
        read_alpaca_kto, "instruction|input output kto_tag", "alpaca thumbs", **THUMBS
    ),
    "ultrafeedback-binarized": Format(
        read_preference,
        "prompt chosen rejected score_chosen score_rejected",
        "UltraFeedback pairs with scores",
        SCORES,
    ),
    "preference": Format(read_preference, "chosen rejected", "preference pairs", PAIR),
    "scored": Format(
        read_scored,
        f"instruction|input output|response {SCORE}",
        "scored instructions",
        **SINGLES,
        reward="score",
    ),
    "single": Format(
        read_single,
        f"{PROMPT} {REPLY} {SCORE}",
        "single responses",
        **SINGLES,
        reward="reward",
    ),
    "unpaired": Format(read_unpaired, f"{PROMPT} {REPLY} label", "thumbs up or down", **THUMBS),
}


def table() -> str:
    """The table of docs/data.md."""
    lines = ["| format | fields | becomes | what it is |", "|---|---|---|---|"]
    for name, kind in FORMATS.items():
        fields = [field.replace("|", "` or `") for field in kind.fields.split()]
        shown = ", ".join(f"`{field}`" for field in fields)
        lines.append(f"| `{name}` | {shown} | {kind.becomes} | {kind.title} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
