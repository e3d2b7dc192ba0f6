"""Preference data: three synthetic tasks with an exact reward, files, a small tokenizer, batches.

A Record is {"prompt": str, "responses": [str, ...], "rewards": [float, ...]}, one line of a .jsonl file.

    make_task("dialogue", rng) -> Task      prompts, logged responses, and reward(prompt, response) -> float
    load(["lists.jsonl"])      -> Records   lists, single responses or COPA-SSE; a bad line ends it with FILE:LINE: what is wrong
    train_bpe(texts, 512)      -> ranks     a byte-pair encoding, used through tiktoken (`encoding`)
    tokenize(records, enc)     -> Examples  token ids, EOS appended
    make_batch(examples, eos)  -> Batch     padded tensors; masks are carried, never guessed from values
"""

import base64
import gzip
import hashlib
import json
import os
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch

EOS = "<|endoftext|>"  # inside a text this is ordinary text: only `encode_ordinary` is used


# --------------------------------------------------------------------------------------------------------- synthetic tasks


@dataclass
class Task:
    """A world with an exact reward. `prompts` has "train", "heldout" (known subjects, asked anew) and "ood" (new subjects)."""

    name: str
    prompts: dict[str, list[str]]
    logged: list[
        dict
    ]  # Records: mixed-quality responses to the training prompts, to train the reference on
    reward: Callable[[str, str], float]
    max_response: int  # tokens, EOS included
    parts: Callable[[str, str], dict[str, float]] = field(
        default=lambda prompt, response: {}
    )  # what the reward is made of
    words: list[str] = field(default_factory=list)  # tiny alone: the words a response is made of


def make_task(name: str, rng) -> Task:
    """Make a synthetic task: "dialogue", "summary" or "tiny".

    The world (prompts, splits, reward) is always the same; the logged responses are drawn with `rng`.

    Args: name: the task; rng: random.Random. Returns: a Task. Raises: ValueError on another name.

    >>> import random
    >>> task = make_task("dialogue", random.Random(0))
    >>> task.reward("How was the Ashford soup?", "The Ashford soup was very hot. It was not bad.")    # 5 + 3 (1.5 + 0.3) / 2
    7.7
    >>> task.reward("How was the Ashford room?", "The Ashford room was very hot. It was not bad.")    # 5 + 3 (-1.5 + 0.3) / 2
    3.2
    >>> task.reward("How was the Ashford soup?", "It was very hot.")                                  # names no subject
    0.0
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name](rng)


# Places are spelt from known syllables, so that a new place can be read and copied, though it was never trained on.
PLACES = [
    a + b
    for a in "Ash Bram Cor Dun El Fern Glen Hol Kel Lyn Mar Nor Os Pen Rad Stan Tar Ux Wal York".split()
    for b in "by cot dale den ford ham ley mere port stow ton wick".split()
]
NEW_PLACES = [
    PLACES[12 * i + 5 * i % 12] for i in range(20)
]  # one of each first syllable: never trained on
OLD_PLACES = [place for place in PLACES if place not in NEW_PLACES]

QUESTIONS = [
    "How was the {}?",
    "What was the {} like?",
    "Did you enjoy the {}?",
    "Was the {} any good?",
    "Tell me about the {}.",
    "Would you recommend the {}?",
]
GENERAL = {"good": 0.4, "lovely": 0.6, "wonderful": 0.8, "poor": -0.4, "bad": -0.6, "awful": -0.8}
KINDS = [  # things, words that praise them, words that blame them: half of the words do both somewhere
    ("soup curry stew pie", "hot rich fresh heavy", "cold small dry light"),
    ("room cabin attic flat", "warm quiet large light", "hot small dark loud"),
    ("phone camera radio watch", "small light quick bright", "hot heavy slow dark"),
    ("show concert play film", "loud dark quick rich", "long slow dry quiet"),
    ("walk hike tour trip", "long slow quiet fresh", "short hot loud heavy"),
]
SENTIMENT = {}  # thing -> {adjective: value}
for things, praise, blame in KINDS:
    for thing in things.split():
        SENTIMENT[thing] = {
            **GENERAL,
            **{w: 1.0 for w in praise.split()},
            **{w: -1.0 for w in blame.split()},
        }
DEGREE = {"very": 1.5, "rather": 0.5}
PHRASE = re.compile(r"(not )?(?:(very|rather) )?([a-z]+)")


def dialogue(rng) -> Task:
    """A question about a thing in a place, an answer of one to three clauses, a mark out of ten.

    reward = 5 + 3 x mean over clauses of value(adjective, thing) x {very 1.5, rather 0.5} x (-0.5 if "not"), an adjective
    counted once, so 0.5 to 9.5; 0 for broken grammar, a word off topic, four clauses, or an answer that does not name its subject.
    Each subject has its own share of praise among its logged answers; one logged answer in twenty is spoilt.
    """

    def reward(prompt, response):
        place, thing = re.search(r"the (\w+) (\w+)", prompt).groups()
        sentiment, named = SENTIMENT[thing], f"The {place} {thing} was "
        clauses = response.strip().removeprefix(named).split(". It was ")
        if not (
            response.strip().startswith(named) and clauses[-1].endswith(".") and len(clauses) <= 3
        ):
            return 0.0
        clauses[-1] = clauses[-1][:-1]
        total, used = 0.0, set()
        for clause in clauses:
            phrase = PHRASE.fullmatch(clause)
            if not phrase or phrase[3] not in sentiment:
                return 0.0
            if phrase[3] not in used:
                total += (
                    sentiment[phrase[3]] * DEGREE.get(phrase[2], 1.0) * (-0.5 if phrase[1] else 1.0)
                )
            used.add(phrase[3])
        return round(5 + 3 * total / len(clauses), 6)

    def answer(place, thing, share):
        clauses = []
        for _ in range(rng.randint(1, 3)):
            good, negated = rng.random() < share, rng.random() < 0.25
            words = [w for w, value in SENTIMENT[thing].items() if (value > 0) == (good != negated)]
            degree = rng.choice(["", "", "very ", "rather "])
            clauses.append(("not " if negated else "") + degree + rng.choice(words))
        if rng.random() < 1 / 60:  # off topic: a word that does not fit the thing
            clauses[-1] = rng.choice(
                sorted({w for s in SENTIMENT.values() for w in s} - set(SENTIMENT[thing]))
            )
        if rng.random() < 1 / 60:  # another subject
            place = rng.choice(OLD_PLACES)
        text = f"The {place} {thing} was " + ". It was ".join(clauses) + "."
        if rng.random() < 1 / 60:  # broken grammar: a word is lost
            words = text.split()
            del words[rng.randrange(len(words))]
            text = " ".join(words)
        return text

    prompts, logged = {"train": [], "heldout": [], "ood": []}, []
    for i, thing in enumerate(SENTIMENT):
        for j, place in enumerate(OLD_PLACES):
            if (i + j) % 8:  # an eighth of all pairs
                continue
            share = (0.06, 0.3, 0.7, 0.94)[i % 4] + (0.04 if j % 16 < 8 else -0.04)
            *train, heldout = [
                QUESTIONS[(i + j // 8 + k) % 6].format(f"{place} {thing}") for k in range(3)
            ]
            prompts["train"] += train
            prompts["heldout"].append(heldout)
            for prompt in train:
                texts = [answer(place, thing, share) for _ in range(4)]
                logged.append(
                    {
                        "prompt": prompt,
                        "responses": texts,
                        "rewards": [reward(prompt, t) for t in texts],
                    }
                )
        for j, place in enumerate(NEW_PLACES):
            prompts["ood"].append(QUESTIONS[(i + j) % 6].format(f"{place} {thing}"))
    return Task("dialogue", prompts, logged, reward, max_response=32)


THINGS = "fair market concert race circus dance museum castle harbour garden theatre bakery school bridge zoo tower".split()
FACTS = ["There is a {}.", "We saw the {}.", "They have a {}.", "I liked the {}."]
DENIALS = ["There is no {}.", "We missed the {}.", "They closed the {}."]
NOISE = ["Sorry for the long post.", "It may rain again.", "Thanks for reading."]
FILLER = ["basically", "anyway", "thanks for reading"]


def summary(rng) -> Task:
    """A post that states several facts of a place among noise and denials, and a TL;DR such as "Ashford: fair, market."

    reward = covered - invented - 0.1 x words: facts of the post named (once each), claims that it does not make (all of
    them where the place is wrong or the form is broken), and the length; fillers cost their length alone.
    """
    stated = re.compile("|".join(f.format(r"(\w+)") for f in FACTS).replace(".", r"\."))

    def facts_of(post):
        return [next(filter(None, m)) for m in stated.findall(post) if any(w in THINGS for w in m)]

    def parts(prompt, response):
        text, place = response.strip(), re.search(r"to (\w+)\.", prompt)[1]
        head, _, rest = text.rstrip(".").partition(": ")
        claims = [c for c in rest.split(", ") if c not in FILLER]
        facts = facts_of(prompt) if head == place and text.endswith(".") else []
        return {
            "covered": len(set(claims) & set(facts)),
            "invented": sum(c not in facts for c in claims),
            "words": len(text.split()),
        }

    def reward(prompt, response):
        p = parts(prompt, response)
        return round(p["covered"] - p["invented"] - 0.1 * p["words"], 6)

    def post(rng, places):
        things = rng.sample(THINGS, 5)
        n, denied = rng.randint(3, 4), rng.randint(0, 1)
        sentences = [rng.choice(FACTS).format(t) for t in things[:n]]
        sentences += [rng.choice(DENIALS).format(t) for t in things[n : n + denied]]
        sentences.append(rng.choice(NOISE))
        rng.shuffle(sentences)
        return " ".join([f"We went to {rng.choice(places)}.", *sentences, "TL;DR:"])

    def tldr(prompt):
        facts, place = facts_of(prompt), re.search(r"to (\w+)\.", prompt)[1]
        claims = [
            rng.choice(THINGS if rng.random() < 1 / 8 else facts) for _ in range(rng.randint(1, 5))
        ]
        claims = [rng.choice(FILLER) if rng.random() < 0.15 else c for c in claims]
        return (
            f"{rng.choice(OLD_PLACES) if rng.random() < 1 / 24 else place}: "
            + ", ".join(claims)
            + "."
        )

    world = random.Random(0)  # the posts are the same in every run
    splits = {"train": (OLD_PLACES, 3000), "heldout": (OLD_PLACES, 300), "ood": (NEW_PLACES, 300)}
    prompts = {
        split: [post(world, places) for _ in range(n)] for split, (places, n) in splits.items()
    }
    logged = []
    for prompt in prompts["train"]:
        texts = [tldr(prompt) for _ in range(4)]
        logged.append(
            {"prompt": prompt, "responses": texts, "rewards": [reward(prompt, t) for t in texts]}
        )
    return Task("summary", prompts, logged, reward, max_response=32, parts=parts)


WORDS = "calm deep cold wide loud dark old wild".split()
FITS = {}  # thing -> the three words that fit it
for fits, things in {
    "deep wide wild": "sea ocean bay",
    "calm deep cold": "lake pond well",
    "wide loud cold": "river stream fall",
    "loud dark wild": "storm night beast",
    "deep dark cold": "cave mine cellar",
    "dark old wild": "forest jungle wood",
    "calm wide wild": "desert plain moor",
    "old cold dark": "castle tomb ruin",
}.items():
    FITS |= {thing: fits for thing in things.split()}
ASK = ["What is the {} like?", "Describe the {}.", "How is the {}?", "Tell me of the {}."]
NEW_THINGS = ["bay", "well", "tomb", "moor"]


def tiny(rng) -> Task:
    """A question answered by 1 to 3 words of 8: all 8 + 64 + 512 = 584 responses of a prompt can be enumerated.

    reward = 1 for each word that fits the thing (once), -0.5 for every other word. NEW_THINGS are never trained on.
    """

    def reward(prompt, response):
        fits, words = FITS[re.search(r"the (\w+)", prompt)[1]].split(), response.split()
        fitting = len(set(words) & set(fits))
        return fitting - 0.5 * (len(words) - fitting)

    prompts, logged = {"train": [], "heldout": [], "ood": []}, []
    for i, (thing, fits) in enumerate(FITS.items()):
        *train, heldout = [ASK[(i + k) % 4].format(thing) for k in range(4)]
        if thing in NEW_THINGS:
            prompts["ood"].append(heldout)
            continue
        prompts["train"] += train
        prompts["heldout"].append(heldout)
        for prompt in train * 4:
            texts = [
                " ".join(
                    rng.choice(fits.split() if rng.random() < 0.2 else WORDS)
                    for _ in range(rng.randint(1, 3))
                )
                for _ in range(8)
            ]
            logged.append(
                {
                    "prompt": prompt,
                    "responses": texts,
                    "rewards": [reward(prompt, t) for t in texts],
                }
            )
    return Task("tiny", prompts, logged, reward, max_response=4, words=WORDS)


def tiny_ranks() -> dict[bytes, int]:
    """The fixed vocabulary of tiny: 256 bytes, then every word of its prompts and responses as one token."""
    words = sorted(
        {w for q in ASK for w in re.findall(SPLIT, q.format(""))}
        | {" " + w for w in [*FITS, *WORDS]}
    )
    return {
        token: i
        for i, token in enumerate(
            [bytes([b]) for b in range(256)] + [w.encode() for w in words if len(w) > 1]
        )
    }


def allowed_tokens(task: Task, enc: tiktoken.Encoding):
    """[max_response, V] bool: the tokens a response of `task` may have at each place; None where all may.

    For tiny: a word at first, then a word or EOS, and EOS alone after the third word.
    """
    if not task.words:
        return None
    words = [enc.encode_single_token(" " + w) for w in task.words]
    mask = torch.zeros(task.max_response, enc.n_vocab, dtype=torch.bool)
    mask[:-1, words] = True
    mask[1:, enc.eot_token] = True
    return mask


TASKS = {"dialogue": dialogue, "summary": summary, "tiny": tiny}


# -------------------------------------------------------------------------------------------------------------------- files


class DataError(ValueError):
    """Something is wrong with the data; the message names file and line."""


def load(paths, limit: int = 0, say=print) -> list[dict]:
    """Read preference data: .jsonl or .jsonl.gz; lists (canonical records, COPA-SSE's own) or single responses with a
    reward or a thumb (`_single`), recognised from the first record. Single responses to one prompt become one list.

    Records that are well-formed but unusable (an empty prompt or response) are dropped and counted.

    Args: paths: files, read in this order; limit: keep the first so many lists (0: all); say: takes lines of news.
    Returns: Records. Raises: DataError("FILE:LINE: what is wrong, what was expected"), or above 5 % of unusable records.
    """
    records = []
    for path in paths:
        if limit and len(records) >= limit:
            break
        found, dropped, number, parse = [], [], 0, None
        for number, line in enumerate(_lines(path), 1):
            if limit and len(records) + len(found) >= limit and parse is not _single:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(
                        f"{type(row).__name__} instead of an object, expected {CANONICAL}"
                    )
                parse = parse or _recognised(row)
                record = _plain(parse(row))
            except DataError as e:
                raise DataError(f"{path}:{number}: {e}") from None
            except (ValueError, RecursionError) as e:
                raise DataError(
                    f"{path}:{number}: not JSON ({getattr(e, 'msg', e)}), expected one object a line"
                ) from None
            if (
                record["prompt"].strip()
                and record["responses"]
                and all(r.strip() for r in record["responses"])
            ):
                found.append(record)
            else:
                dropped.append(number)
        if not found and not dropped:
            raise DataError(f"{path}:{max(number, 1)}: no record, expected {CANONICAL}")
        if dropped:
            say(
                f"{path}: {len(dropped)} of {len(found) + len(dropped)} records dropped: empty prompt or response "
                f"(lines {', '.join(map(str, dropped[:5]))}{' ...' if len(dropped) > 5 else ''})"
            )
            if len(dropped) > 0.05 * (len(found) + len(dropped)):
                raise DataError(
                    f"{path}:{dropped[0]}: more than 5 % of the records are unusable, expected text in prompt and responses"
                )
        if parse is _single:
            found = _grouped(found)[: limit - len(records) if limit else None]
        first = found[0]
        best = first["responses"][first["rewards"].index(max(first["rewards"]))]
        say(
            f"{path}: {KINDS_OF_DATA[parse]}, {len(found)} prompts, "
            f"{sum(len(r['responses']) for r in found)} responses; best of record 1: {best[:60]!r}"
        )
        records += found
    return records


COPA = '{"p": str, "asks-for": "cause" or "effect", "a1": str, "a2": str, "most-plausible-alternative": 1 or 2, "human-explanations": [...]}'
CANONICAL = '{"prompt": str, "responses": [str, ...], "rewards": [number, ...]}'
SINGLE = (
    '{"prompt": str, "response": str, "reward": number}, or "label": true or false for the reward'
)


def _recognised(row):
    if "human-explanations" in row:
        return _copa
    return (
        _single
        if "responses" not in row and ("response" in row or "completion" in row)
        else _canonical
    )


def _grouped(records):
    """One list a prompt, in the order of first appearance."""
    lists = {}
    for r in records:
        found = lists.setdefault(
            r["prompt"], {"prompt": r["prompt"], "responses": [], "rewards": []}
        )
        found["responses"] += r["responses"]
        found["rewards"] += r["rewards"]
    return list(lists.values())


def _lines(path):
    """Text lines of a file, decompressed if its name ends in .gz; what cannot be read becomes a DataError."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as e:
                    raise DataError(
                        f"{path}:{number}: byte {e.start} is not UTF-8, expected UTF-8 text"
                    ) from None
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(
            f"{path}:1: {getattr(e, 'strerror', None) or e}, expected a readable .jsonl or .jsonl.gz file"
        ) from None


def _plain(record):
    """Lone surrogates, legal in JSON and in nothing else, become question marks."""
    clean = lambda text: text.encode("utf-8", "replace").decode()
    return record | {
        "prompt": clean(record["prompt"]),
        "responses": [clean(r) for r in record["responses"]],
    }


def _need(row, name, kind, what, form=None):
    if name not in row:
        raise DataError(f"no field {name!r}, expected {form or CANONICAL}")
    if not isinstance(row[name], kind):
        raise DataError(f"{name!r} is {type(row[name]).__name__}, expected {what}")
    return row[name]


def _number(x, where):
    if (
        isinstance(x, bool) or not isinstance(x, (int, float)) or not abs(x) <= 1e30
    ):  # float32 and its squares
        raise DataError(f"{where} is {x!r}, expected a finite number (up to 1e30)")
    return float(x)


def _canonical(row):
    prompt = _need(row, "prompt", str, "a string")
    responses, rewards = (
        _need(row, "responses", list, "a list of strings"),
        _need(row, "rewards", list, "a list of numbers"),
    )
    if not all(isinstance(r, str) for r in responses):
        raise DataError("'responses' holds something else than strings, expected a list of strings")
    if len(responses) != len(rewards):
        raise DataError(
            f"{len(responses)} responses and {len(rewards)} rewards, expected as many rewards as responses"
        )
    return {
        "prompt": prompt,
        "responses": responses,
        "rewards": [_number(r, f"reward {i + 1}") for i, r in enumerate(rewards)],
    }


def _single(row):
    """One response: `response` or `completion` with `reward`, `score` or `rating`, or with `label`, a thumb up (+1) or down (-1)."""
    name = lambda *names: next((n for n in names if n in row), names[0])
    reward = name("reward", "score", "rating", "label")
    if reward == "label":
        thumb = row["label"]
        if not isinstance(thumb, bool):
            if not isinstance(thumb, (int, float)):
                raise DataError(
                    f"'label' is {thumb!r}, expected true or false, or a number (thumbs up above 0)"
                )
            thumb = _number(thumb, "'label'") > 0
        value = 1.0 if thumb else -1.0
    else:
        value = _number(_need(row, reward, object, "a number", SINGLE), f"{reward!r}")
    text = _need(row, name("response", "completion"), str, "a string", SINGLE)
    return {
        "prompt": _need(row, "prompt", str, "a string", SINGLE),
        "responses": [text],
        "rewards": [value],
    }


def _copa(row):
    """COPA-SSE (Brassard et al. 2022): the premise, Why? or So what?, the right answer; rated explanations."""
    asks = _need(row, "asks-for", str, '"cause" or "effect"', COPA)
    if asks not in ("cause", "effect"):
        raise DataError(f'\'asks-for\' is {asks!r}, expected "cause" or "effect"')
    right = str(_need(row, "most-plausible-alternative", (str, int), "1 or 2", COPA))
    if right not in ("1", "2"):
        raise DataError(f"'most-plausible-alternative' is {right!r}, expected 1 or 2")
    question = "Why?" if asks == "cause" else "So what?"
    rated = _need(row, "human-explanations", list, "a list of explanations")
    if not all(isinstance(e, dict) for e in rated):
        raise DataError(
            "'human-explanations' holds something else than objects, expected explanations"
        )
    return {
        "prompt": f"{_need(row, 'p', str, 'a string', COPA)} {question} {_need(row, 'a' + right, str, 'a string', COPA)}",
        "responses": [
            _need(e, "text", str, "a string", '{"text": str, "filtered-avg-rating": number}')
            for e in rated
        ],
        "rewards": [
            _number(e.get("filtered-avg-rating"), f"filtered-avg-rating of explanation {i + 1}")
            for i, e in enumerate(rated)
        ],
    }


KINDS_OF_DATA = {
    _canonical: "canonical lists",
    _copa: "COPA-SSE lists",
    _single: "single responses",
}


def split(records, share: float = 0.1):
    """Train and held-out lists: a prompt is held out by a hash of its text, so the same prompt always falls on the same side."""
    held = [
        int(hashlib.sha256(r["prompt"].encode("utf-8", "replace")).hexdigest()[:8], 16)
        < share * 2**32
        for r in records
    ]
    return [r for r, h in zip(records, held) if not h], [r for r, h in zip(records, held) if h]


# --------------------------------------------------------------------------------------------------------------- tokenizer

# Words with the space before them, runs of punctuation, white space. Every character matches one of the three branches.
SPLIT = r" ?[^\W_]+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"


def train_bpe(texts, vocab_size: int, max_bytes: int = 20_000_000) -> dict[bytes, int]:
    """Learn a byte-pair encoding: start from the 256 bytes and join the most frequent pair, again and again.

    Pre-tokens (SPLIT) are counted once and only the words that hold the joined pair are touched. Ties go to the pair
    that is smaller as (bytes, bytes). Stops early where no pair occurs twice.

    Args: texts: iterable of str; vocab_size: tokens in all, EOS included; max_bytes: text read at most.
    Returns: {token: rank}, of at most vocab_size - 1 entries: the last id is left to EOS. Raises: ValueError under 257.

    >>> ranks = train_bpe(["aaab aaab"], 259)
    >>> [token for token, rank in ranks.items() if rank >= 256]
    [b'aa', b'ab']
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size {vocab_size}: a byte-level vocabulary needs at least 256 bytes and EOS"
        )
    counts, size = Counter(), 0
    for text in texts:
        size += len(text.encode("utf-8", "replace"))
        if size > max_bytes:
            break
        counts.update(re.findall(SPLIT, text))
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in counts]
    weights = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> count; pair -> the words that may hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weights[i]
            where[pair].add(i)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - 1 and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        joined = best[0] + best[1]
        ranks.setdefault(joined, len(ranks))
        for i in where.pop(best):
            word, new = words[i], []
            for pair in zip(word, word[1:]):
                pairs[pair] -= weights[i]
            while word:
                step = 2 if tuple(word[:2]) == best else 1
                new.append(joined if step == 2 else word[0])
                word = word[step:]
            words[i] = new
            for pair in zip(new, new[1:]):
                pairs[pair] += weights[i]
                where[pair].add(i)
        pairs += Counter()  # drop the pairs that are gone
    return ranks


def encoding(ranks: dict[bytes, int], name: str = "small") -> tiktoken.Encoding:
    """A tiktoken.Encoding of these ranks with EOS as the last id (`.eot_token`)."""
    return tiktoken.Encoding(
        name,
        pat_str=SPLIT,
        mergeable_ranks=ranks,
        special_tokens={EOS: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def save_ranks(ranks: dict[bytes, int], path) -> None:
    """One `base64 rank` a line, tiktoken's own plain format."""
    Path(path).write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    )


def load_ranks(path) -> dict[bytes, int]:
    """Read `save_ranks`' file (tiktoken's own reader caches local files and may serve a stale one)."""
    return {
        base64.b64decode(token): int(rank)
        for token, rank in map(str.split, Path(path).read_text().splitlines())
    }


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's own encoding; tiktoken downloads it on first use. Raises: DataError where that fails, with the way out."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, without importing requests
        raise DataError(
            f"--tokenizer gpt2: tiktoken could not download GPT-2's vocabulary ({type(e).__name__}). Run it once with a network, "
            f"or set TIKTOKEN_CACHE_DIR (now {os.environ.get('TIKTOKEN_CACHE_DIR', 'not set')}) to a folder that holds it."
        ) from None


# ------------------------------------------------------------------------------------------------------------------ batches


@dataclass
class Example:
    """A tokenised list: EOS ends a response unless it was truncated. `ref_logps` is filled in by the training loop."""

    prompt: str
    prompt_ids: list[int]
    response_ids: list[list[int]]
    rewards: list[float]
    ref_logps: list[float] | None = None


def tokenize(
    records, enc, max_prompt: int = 0, max_response: int = 0, say=lambda line: None
) -> list[Example]:
    """Records to Examples. Prompt and response are encoded apart and joined as ids.

    Where neither side has white space at the seam, a space is put before the response. A long prompt loses its beginning
    (at least one token stays), a long response its end, and with it its EOS; the truncated shares are said.

    Args: records; enc: tiktoken.Encoding; max_prompt, max_response: tokens kept (0: all), EOS included; say: takes news.
    """
    examples, spaced, long_prompts, long_responses, n = [], 0, 0, 0, 0
    for record in records:
        prompt_ids = enc.encode_ordinary(record["prompt"])
        long_prompts += bool(max_prompt and len(prompt_ids) > max_prompt)
        responses = []
        for text in record["responses"]:
            if not record["prompt"][-1:].isspace() and not text[:1].isspace():
                text, spaced = " " + text, spaced + 1
            ids = enc.encode_ordinary(text) + [enc.eot_token]
            if max_response and len(ids) > max_response:
                ids, long_responses = ids[:max_response], long_responses + 1
            responses.append(ids)
            n += 1
        examples.append(
            Example(
                record["prompt"],
                prompt_ids[-max_prompt:] if max_prompt else prompt_ids,
                responses,
                record["rewards"],
            )
        )
    if spaced:
        say(f"a space was put between prompt and response in {spaced} of {n} responses")
    if long_prompts or long_responses:
        say(
            f"truncated: {long_prompts / len(records):.1%} of the prompts, {long_responses / max(n, 1):.1%} of the responses"
        )
    return examples


@dataclass
class Batch:
    """B lists, padded to the batch's own longest prompt, list and response. Masks are True where something real stands."""

    prompt_ids: torch.Tensor  # [B, S]
    prompt_mask: torch.Tensor  # [B, S]
    response_ids: torch.Tensor  # [B, M, R]
    response_mask: torch.Tensor  # [B, M, R], EOS included
    candidate_mask: torch.Tensor  # [B, M]
    rewards: torch.Tensor  # [B, M]
    ref_logps: torch.Tensor | None = None  # [B, M]


def make_batch(examples, eos: int, device="cpu") -> Batch:
    """Pad Examples to tensors. Padding ids are EOS, padding rewards and ref_logps 0.

    >>> batch = make_batch([Example("", [1, 2], [[3, 0], [4]], [1.0, 2.0]), Example("", [5], [[6, 0]], [3.0])], eos=0)
    >>> batch.response_ids.shape, batch.candidate_mask.tolist()
    (torch.Size([2, 2, 2]), [[True, True], [True, False]])
    """
    pad = lambda row, n, what: [*row, *[what] * (n - len(row))]
    M = max(len(e.response_ids) for e in examples)
    S, R = (
        max(len(e.prompt_ids) for e in examples),
        max(len(ids) for e in examples for ids in e.response_ids),
    )
    prompt_ids = torch.tensor([pad(e.prompt_ids, S, eos) for e in examples])
    prompt_length = torch.tensor([len(e.prompt_ids) for e in examples])
    lists = [pad(e.response_ids, M, []) for e in examples]
    response_ids = torch.tensor([[pad(ids, R, eos) for ids in row] for row in lists])
    response_mask = (
        torch.arange(R) < torch.tensor([[len(ids) for ids in row] for row in lists])[..., None]
    )
    rewards, ref_logps = torch.tensor([pad(e.rewards, M, 0.0) for e in examples]), None
    if all(e.ref_logps is not None for e in examples):
        ref_logps = torch.tensor([pad(e.ref_logps, M, 0.0) for e in examples])
    prompt_mask = torch.arange(S) < prompt_length[:, None]
    batch = (
        prompt_ids,
        prompt_mask,
        response_ids,
        response_mask,
        response_mask[..., 0],
        rewards,
        ref_logps,
    )
    return Batch(*(None if t is None else t.to(device) for t in batch))


def batch_order(examples, batch_size: int, generator) -> list[list[int]]:
    """One epoch: indices of the batches, in random order. Lists of about the same length share a batch (less padding).

    Every example stands in exactly one batch; the last and smaller one is kept. Buckets are runs of 8 batches of the
    shuffled data, sorted by length, so the order stays random where lengths are alike.
    """
    order = torch.randperm(len(examples), generator=generator).tolist()
    longest = [len(e.prompt_ids) + max(map(len, e.response_ids)) for e in examples]
    batches = []
    for start in range(0, len(order), 8 * batch_size):
        bucket = sorted(order[start : start + 8 * batch_size], key=lambda i: longest[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
