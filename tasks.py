"""Three synthetic worlds with an exact reward: dialogue, summary and tiny.

    make_task("dialogue", random.Random(0)) -> Task    prompts, logged responses,
                                                       reward(prompt, response)

A world (its prompts, their split, the reward) is always the same; the logged responses, of mixed
quality, are drawn anew for every seed. A new task is one function and one row of TASKS.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Task:
    """A world: "train" prompts, "heldout" (known subjects, asked anew), "ood" (new subjects)."""

    name: str
    prompts: dict[str, list[str]]
    # Records: mixed-quality responses to the training prompts, for the reference.
    logged: list[dict]
    reward: Callable[[str, str], float]
    max_response: int  # tokens, EOS included
    breakdown: Callable[[str, str], dict[str, float]] = lambda prompt, response: {}  # of the reward
    # All that a response is made of, if it is so few.
    words: list[str] = field(default_factory=list)
    vocabulary: list[str] = field(default_factory=list)  # fixed tokens; empty: a BPE is trained


def make_task(name: str, rng: random.Random) -> Task:
    """Make a synthetic task: "dialogue", "summary" or "tiny".

    Args: name: a row of TASKS; rng: draws the logged responses.
    Returns: a Task.
    Raises: ValueError on another name.

    >>> task = make_task("dialogue", random.Random(0))
    >>> question = "How was the Ashford soup?"
    >>> answer = "The Ashford soup was very hot. It was not bad."
    >>> task.reward(question, answer)  # 5 + 3 (1.5 + 0.3) / 2
    7.7
    >>> task.reward("How was the Ashford room?", "The Ashford room was very hot.")  # 5 - 3 x 1.5
    0.5
    >>> task.reward(question, "It was very hot.")  # no subject
    0.0
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name].make(rng)


# ----------------------------------------------------------------------------------------- dialogue

# Places are spelt from known syllables, so that a new place can be read and copied.
FIRST = "Ash Bram Cor Dun El Fern Glen Hol Kel Lyn Mar Nor Os Pen Rad Stan Tar Ux Wal York".split()
LAST = "by cot dale den ford ham ley mere port stow ton wick".split()
PLACES = [first + last for first in FIRST for last in LAST]
NEW_PLACES = [PLACES[12 * i + 5 * i % 12] for i in range(20)]  # one of each first syllable
OLD_PLACES = [place for place in PLACES if place not in NEW_PLACES]  # the only ones trained on

QUESTIONS = [
    "How was the {}?",
    "What was the {} like?",
    "Did you enjoy the {}?",
    "Was the {} any good?",
    "Tell me about the {}.",
    "Would you recommend the {}?",
]
GENERAL = {"good": 0.4, "lovely": 0.6, "wonderful": 0.8, "poor": -0.4, "bad": -0.6, "awful": -0.8}
KINDS = [  # things, words that praise them, words that blame them: half do both somewhere
    ("soup curry stew pie", "hot rich fresh heavy", "cold small dry light"),
    ("room cabin attic flat", "warm quiet large light", "hot small dark loud"),
    ("phone camera radio watch", "small light quick bright", "hot heavy slow dark"),
    ("show concert play film", "loud dark quick rich", "long slow dry quiet"),
    ("walk hike tour trip", "long slow quiet fresh", "short hot loud heavy"),
]
SENTIMENT = {}  # thing -> {adjective: value}
for things, praise, blame in KINDS:
    for thing in things.split():
        values = {w: 1.0 for w in praise.split()} | {w: -1.0 for w in blame.split()}
        SENTIMENT[thing] = {**GENERAL, **values}
ADJECTIVES = sorted({word for sentiment in SENTIMENT.values() for word in sentiment})
DEGREE = {"very": 1.5, "rather": 0.5}
PHRASE = re.compile(r"(not )?(?:(very|rather) )?([a-z]+)")


def dialogue(rng: random.Random) -> Task:
    """A question about a thing in a place, an answer of one to three clauses, a mark out of ten.

    reward = 5 + 3 x mean over clauses of value(adjective, thing) x {very 1.5, rather 0.5} x (-0.5
    if "not"), an adjective counted once, so 0.5 to 9.5; 0 for broken grammar, a word off topic,
    four clauses, or an answer that does not name its subject. Each subject has its own share of
    praise among its logged answers; one logged answer in twenty is spoilt.
    """

    def reward(prompt, response):
        place, thing = re.search(r"the (\w+) (\w+)", prompt).groups()
        sentiment, named = SENTIMENT[thing], f"The {place} {thing} was "
        text = response.strip()
        clauses = text.removeprefix(named).split(". It was ")
        if not (text.startswith(named) and clauses[-1].endswith(".") and len(clauses) <= 3):
            return 0.0
        clauses[-1] = clauses[-1][:-1]
        total, used = 0.0, set()
        for clause in clauses:
            phrase = PHRASE.fullmatch(clause)
            if not phrase or phrase[3] not in sentiment:
                return 0.0
            negation, degree, adjective = phrase.groups()
            if adjective not in used:
                sign = -0.5 if negation else 1.0
                total += sentiment[adjective] * DEGREE.get(degree, 1.0) * sign
            used.add(adjective)
        return round(5 + 3 * total / len(clauses), 6)

    def answer(place, thing, praise_share):
        clauses = []
        for _ in range(rng.randint(1, 3)):
            good, negated = rng.random() < praise_share, rng.random() < 0.25
            words = [w for w, v in SENTIMENT[thing].items() if (v > 0) == (good != negated)]
            degree = rng.choice(["", "", "very ", "rather "])
            clauses.append(("not " if negated else "") + degree + rng.choice(words))
        if rng.random() < 1 / 60:  # off topic: a word that does not fit the thing
            clauses[-1] = rng.choice([w for w in ADJECTIVES if w not in SENTIMENT[thing]])
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
            subject = f"{place} {thing}"
            *train, heldout = [QUESTIONS[(i + j // 8 + k) % 6].format(subject) for k in range(3)]
            prompts["train"] += train
            prompts["heldout"].append(heldout)
            for prompt in train:
                logged.append(
                    rewarded(prompt, [answer(place, thing, share) for _ in range(4)], reward)
                )
        for j, place in enumerate(NEW_PLACES):
            prompts["ood"].append(QUESTIONS[(i + j) % 6].format(f"{place} {thing}"))
    return Task("dialogue", prompts, logged, reward, max_response=32)


def rewarded(prompt: str, responses: list[str], reward: Callable[[str, str], float]) -> dict:
    """A Record: a prompt, its responses and their rewards."""
    rewards = [reward(prompt, response) for response in responses]
    return {"prompt": prompt, "responses": responses, "rewards": rewards}


# ------------------------------------------------------------------------------------------ summary

THINGS = (
    "fair market concert race circus dance museum castle harbour garden theatre bakery school "
    "bridge zoo tower"
).split()
FACTS = ["There is a {}.", "We saw the {}.", "They have a {}.", "I liked the {}."]
DENIALS = ["There is no {}.", "We missed the {}.", "They closed the {}."]
NOISE = ["Sorry for the long post.", "It may rain again.", "Thanks for reading."]
FILLER = ["basically", "anyway", "thanks for reading"]
STATED = re.compile("|".join(fact.format(r"(\w+)") for fact in FACTS).replace(".", r"\."))


def summary(rng: random.Random) -> Task:
    """A post that states several facts of a place among noise and denials, and a TL;DR.

    reward = covered - invented - 0.1 x words: facts of the post named (once each), claims that it
    does not make (all of them where the place is wrong or the form is broken), and the length;
    fillers cost their length alone. "Ashford: fair, market." is such a TL;DR.
    """

    def facts_of(post):
        stated = [next(filter(None, match)) for match in STATED.findall(post) if any(match)]
        return [thing for thing in stated if thing in THINGS]

    def place_of(post):
        return re.search(r"to (\w+)\.", post)[1]

    def breakdown(prompt, response):
        text = response.strip()
        head, _, rest = text.rstrip(".").partition(": ")
        claims = [claim for claim in rest.split(", ") if claim not in FILLER]
        in_form = head == place_of(prompt) and text.endswith(".")
        facts = facts_of(prompt) if in_form else []
        return {
            "covered": len(set(claims) & set(facts)),
            "invented": sum(claim not in facts for claim in claims),
            "words": len(text.split()),
        }

    def reward(prompt, response):
        counts = breakdown(prompt, response)
        return round(counts["covered"] - counts["invented"] - 0.1 * counts["words"], 6)

    def post(rng, places):
        things = rng.sample(THINGS, 5)
        stated, denied = rng.randint(3, 4), rng.randint(0, 1)
        sentences = [rng.choice(FACTS).format(thing) for thing in things[:stated]]
        denials = things[stated : stated + denied]
        sentences += [rng.choice(DENIALS).format(thing) for thing in denials]
        sentences.append(rng.choice(NOISE))
        rng.shuffle(sentences)
        return " ".join([f"We went to {rng.choice(places)}.", *sentences, "TL;DR:"])

    def tldr(prompt):
        facts, place = facts_of(prompt), place_of(prompt)
        claims = [
            rng.choice(THINGS if rng.random() < 1 / 8 else facts) for _ in range(rng.randint(1, 5))
        ]
        claims = [rng.choice(FILLER) if rng.random() < 0.15 else claim for claim in claims]
        head = rng.choice(OLD_PLACES) if rng.random() < 1 / 24 else place
        return f"{head}: " + ", ".join(claims) + "."

    world = random.Random(0)  # the posts are the same in every run
    splits = {"train": (OLD_PLACES, 3000), "heldout": (OLD_PLACES, 300), "ood": (NEW_PLACES, 300)}
    prompts = {
        split: [post(world, places) for _ in range(n)] for split, (places, n) in splits.items()
    }
    logged = [rewarded(p, [tldr(p) for _ in range(4)], reward) for p in prompts["train"]]
    return Task("summary", prompts, logged, reward, max_response=32, breakdown=breakdown)


# --------------------------------------------------------------------------------------------- tiny

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
NEW_THINGS = ["bay", "well", "tomb", "moor"]  # never trained on


def tiny(rng: random.Random) -> Task:
    """A question answered by 1 to 3 words of 8: all 8 + 64 + 512 = 584 responses can be enumerated.

    reward = 1 for each word that fits the thing (once), -0.5 for every other word.
    """

    def reward(prompt, response):
        fits, words = FITS[re.search(r"the (\w+)", prompt)[1]].split(), response.split()
        fitting = len(set(words) & set(fits))
        return fitting - 0.5 * (len(words) - fitting)

    def answer(fits):
        return " ".join(
            rng.choice(fits.split() if rng.random() < 0.2 else WORDS)
            for _ in range(rng.randint(1, 3))
        )

    prompts, logged = {"train": [], "heldout": [], "ood": []}, []
    for i, (thing, fits) in enumerate(FITS.items()):
        *train, heldout = [ASK[(i + k) % 4].format(thing) for k in range(4)]
        if thing in NEW_THINGS:
            prompts["ood"].append(heldout)
            continue
        prompts["train"] += train
        prompts["heldout"].append(heldout)
        logged += [rewarded(p, [answer(fits) for _ in range(8)], reward) for p in train * 4]
    asked = {
        word for question in ASK for word in re.findall(r" ?\w+| ?[^\w\s]", question.format(""))
    }
    vocabulary = sorted(asked | {" " + word for word in [*FITS, *WORDS]})
    return Task("tiny", prompts, logged, reward, max_response=4, words=WORDS, vocabulary=vocabulary)


class TaskRow(NamedTuple):
    make: Callable[[random.Random], Task]
    defaults: dict = {}  # of a run on this task, where they are not those of every task
    unread: tuple[str, ...] = ()  # options that a run on it does not read


TASKS = {
    "dialogue": TaskRow(dialogue),
    # Copying out of a post of 70 tokens is learnt sooner at half the rate.
    "summary": TaskRow(summary, {"reference_lr": 2e-3}),
    "tiny": TaskRow(tiny, unread=("vocab_size",)),
}
