"""Three synthetic worlds with an exact reward: dialogue, summary and tiny.

    make_task("dialogue", seed=0) -> Task     prompts, logged responses, reward(prompt, response)

A world hands out its training prompts and their logged answers by index, so dialogue and summary
are too large to memorise. Prompts and reward are always the same; the logged answers, of mixed
quality, are drawn anew for every seed. A new task is one function and one row of TASKS.
"""

import bisect
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Task:
    """A world: training prompts, "heldout" ones (never asked before), "ood" ones (new subjects)."""

    name: str
    train: Sequence[str]  # a list, or ByIndex
    heldout: list[str]
    ood: list[str]
    # Logged answers of mixed quality to a prompt: what the reference learns from.
    answers: Callable[[str, random.Random], list[str]]
    reward: Callable[[str, str], float]
    max_response: int  # tokens, EOS included
    breakdown: Callable[[str, str], dict[str, float]] = lambda prompt, response: {}  # of the reward
    # All that a response is made of, if it is so few.
    words: list[str] = field(default_factory=list)
    vocabulary: list[str] = field(default_factory=list)  # fixed tokens; empty: a BPE is trained
    seed: int = 0  # of the logged answers

    def prompts(self, split: str, start: int = 0, count: int | None = None) -> list[str]:
        """Prompts of a split from this index on (default: all); after the last comes the first.

        Args: split: "train", "heldout" or "ood".
        """
        prompts = getattr(self, split)
        stop = len(prompts) if count is None else start + count
        return [prompts[i % len(prompts)] for i in range(start, stop)]

    def logged(self, start: int, count: int) -> list[dict]:
        """Records of training prompts from this index on, each with its logged answers.

        An index has the same answers whatever else is asked for; one beyond the last prompt has the
        prompt of an earlier one, with answers of its own.
        """
        return [
            rewarded(prompt, self.answers(prompt, random.Random(f"{self.seed} {i}")), self.reward)
            for i, prompt in enumerate(self.prompts("train", start, count), start)
        ]


class ByIndex(Sequence):
    """A sequence whose items are made when they are asked for; a slice is a list."""

    def __init__(self, size: int, make: Callable[[int], str]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int | slice) -> str | list[str]:
        indices = range(self.size)[index]
        return self.make(indices) if isinstance(indices, int) else list(map(self.make, indices))


def rewarded(prompt: str, responses: list[str], reward: Callable[[str, str], float]) -> dict:
    """A Record: a prompt, its responses and their rewards."""
    rewards = [reward(prompt, response) for response in responses]
    return {"prompt": prompt, "responses": responses, "rewards": rewards}


def make_task(name: str, seed: int = 0) -> Task:
    """Make a synthetic task: "dialogue", "summary" or "tiny".

    Args: name: a row of TASKS; seed: of the logged answers.
    Returns: a Task.
    Raises: ValueError on another name.

    >>> task = make_task("dialogue")
    >>> question = "How was the Ashford soup?"
    >>> answer = "The Ashford soup was very hot. It was not bad."
    >>> task.reward(question, answer)  # 5 + 2 x (1.5 + 0.3) - 2 x 0.1
    8.4
    >>> task.reward("How was the Ashford room?", "The Ashford room was very hot.")  # - 2 x 1.5
    1.9
    >>> task.reward(question, "It was very hot.")  # no subject
    0.0
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}")
    task = TASKS[name].make()
    task.seed = seed
    return task


# ----------------------------------------------------------------------------------------- dialogue

# Places are spelt from known syllables, so that a new place can be read and copied.
FIRST = (
    "Al Ash Bar Bram Ched Cor Dal Dun Ed El Far Fern Glen Graf Hat Hol Ips Kel Ken Lan Lyn Mar Mel "
    "Nant Nor Oak Os Pem Pen Rad Rock Sal Stan Tar Thorn Upp Ux Wal Wood York"
).split()
LAST = (
    "bourne bridge bury by combe cot dale den field ford gate grove ham hurst ley mere minster "
    "mouth port stead stow ton wick worth"
).split()
PLACES = [first + last for first in FIRST for last in LAST]
NEW_PLACES = [PLACES[24 * i + 5 * i % 24] for i in range(40)]  # one of each first syllable
OLD_PLACES = [place for place in PLACES if place not in NEW_PLACES]  # the only ones trained on

QUESTIONS = [
    "How was the {}?",
    "What was the {} like?",
    "Did you enjoy the {}?",
    "Was the {} any good?",
    "Tell me about the {}.",
    "Would you recommend the {}?",
    "How did you find the {}?",
    "What can you say about the {}?",
    "Please describe the {}.",
    "Is the {} worth it?",
    "What did you think of the {}?",
    "Any words on the {}?",
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


def dialogue() -> Task:
    """A question about a thing in a place, an answer of one to three clauses, a mark out of ten.

    reward = 5 + 2 x praise - 0.1 x clauses; praise is the sum over different adjectives of
    value(adjective, thing) x {very 1.5, rather 0.5} x (-0.5 if "not"), kept within -2 and 2. It is
    0 for broken grammar, a word off topic, four clauses, or an answer that does not name its
    subject. Each thing has its own share of praise among its logged answers; one logged answer in
    twenty is spoilt.
    """
    things, subjects = list(SENTIMENT), len(OLD_PLACES) * len(SENTIMENT)
    every = subjects * len(QUESTIONS)
    held_out = sorted(random.Random(0).sample(range(every), 300))
    before = [index - k for k, index in enumerate(held_out)]  # training prompts before each

    def prompt(index):
        # 136,463 has no divisor in common with `every`: each question is asked once.
        which, subject = divmod(136_463 * index % every, subjects)
        thing, place = divmod(subject, len(OLD_PLACES))
        return QUESTIONS[which].format(f"{OLD_PLACES[place]} {things[thing]}")

    def subject_of(prompt):
        return re.search(r"the (\w+) (\w+)", prompt).groups()

    def reward(prompt, response):
        place, thing = subject_of(prompt)
        sentiment, named = SENTIMENT[thing], f"The {place} {thing} was "
        text = response.strip()
        clauses = text.removeprefix(named).split(". It was ")
        if not (text.startswith(named) and clauses[-1].endswith(".") and len(clauses) <= 3):
            return 0.0
        clauses[-1] = clauses[-1][:-1]
        praise, used = 0.0, set()
        for clause in clauses:
            phrase = PHRASE.fullmatch(clause)
            if not phrase or phrase[3] not in sentiment:
                return 0.0
            negation, degree, adjective = phrase.groups()
            if adjective not in used:
                sign = -0.5 if negation else 1.0
                praise += sentiment[adjective] * DEGREE.get(degree, 1.0) * sign
            used.add(adjective)
        return round(5 + 2 * max(-2.0, min(praise, 2.0)) - 0.1 * len(clauses), 6)

    def answer(place, thing, rng):
        praise_share = (0.1, 0.3, 0.7, 0.9)[things.index(thing) % 4]
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

    def answers(prompt, rng):
        return [answer(*subject_of(prompt), rng) for _ in range(4)]

    train = ByIndex(every - 300, lambda index: prompt(index + bisect.bisect_right(before, index)))
    heldout = [prompt(index) for index in held_out]
    ood = [
        QUESTIONS[(i + j) % len(QUESTIONS)].format(f"{place} {thing}")
        for i, thing in enumerate(things)
        for j, place in enumerate(NEW_PLACES)
    ]

    def breakdown(prompt, response):
        return {"broken": float(reward(prompt, response) == 0)}

    return Task("dialogue", train, heldout, ood, answers, reward, 32, breakdown)


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


def summary() -> Task:
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

    def post(places, name):
        rng = random.Random(name)
        things = rng.sample(THINGS, 5)
        stated, denied = rng.randint(3, 4), rng.randint(0, 1)
        sentences = [rng.choice(FACTS).format(thing) for thing in things[:stated]]
        denials = things[stated : stated + denied]
        sentences += [rng.choice(DENIALS).format(thing) for thing in denials]
        sentences.append(rng.choice(NOISE))
        rng.shuffle(sentences)
        return " ".join([f"We went to {rng.choice(places)}.", *sentences, "TL;DR:"])

    def tldr(facts, place, rng):
        claims = [
            rng.choice(THINGS if rng.random() < 1 / 8 else facts) for _ in range(rng.randint(1, 5))
        ]
        claims = [rng.choice(FILLER) if rng.random() < 0.15 else claim for claim in claims]
        head = rng.choice(OLD_PLACES) if rng.random() < 1 / 24 else place
        return f"{head}: " + ", ".join(claims) + "."

    def answers(prompt, rng):
        facts, place = facts_of(prompt), place_of(prompt)
        return [tldr(facts, place, rng) for _ in range(4)]

    return Task(
        "summary",
        train=ByIndex(200_000, lambda index: post(OLD_PLACES, f"train {index}")),
        heldout=[post(OLD_PLACES, f"heldout {i}") for i in range(300)],
        ood=[post(NEW_PLACES, f"ood {i}") for i in range(300)],
        answers=answers,
        reward=reward,
        max_response=32,
        breakdown=breakdown,
    )


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


def tiny() -> Task:
    """A question answered by 1 to 3 words of 8: all 8 + 64 + 512 = 584 responses can be enumerated.

    reward = 1 for each word that fits the thing (once), -0.5 for every other word.
    """

    def fits_of(prompt):
        return FITS[re.search(r"the (\w+)", prompt)[1]].split()

    def reward(prompt, response):
        fits, words = fits_of(prompt), response.split()
        fitting = len(set(words) & set(fits))
        return fitting - 0.5 * (len(words) - fitting)

    def answers(prompt, rng):
        fits = fits_of(prompt)
        pick = lambda: rng.choice(fits if rng.random() < 0.2 else WORDS)
        return [" ".join(pick() for _ in range(rng.randint(1, 3))) for _ in range(8)]

    train, heldout, ood = [], [], []
    for i, thing in enumerate(FITS):
        *first, last = [ASK[(i + k) % 4].format(thing) for k in range(4)]
        if thing in NEW_THINGS:
            ood.append(last)
        else:
            train += first
            heldout.append(last)
    asked = {
        word for question in ASK for word in re.findall(r" ?\w+| ?[^\w\s]", question.format(""))
    }
    vocabulary = sorted(asked | {" " + word for word in [*FITS, *WORDS]})
    return Task(
        "tiny",
        train,
        heldout,
        ood,
        answers,
        reward,
        max_response=4,
        words=WORDS,
        vocabulary=vocabulary,
    )


class TaskRow(NamedTuple):
    make: Callable[[], Task]
    defaults: dict = {}  # of a run on this task, where they are not those of every task
    unread: tuple[str, ...] = ()  # options that a run on it does not read


TASKS = {
    "dialogue": TaskRow(dialogue),
    # Copying out of a post of 70 tokens takes longer, and half the rate, to learn.
    "summary": TaskRow(summary, {"reference_lr": 2e-3, "reference_steps": 800, "steps": 400}),
    "tiny": TaskRow(
        tiny,
        {
            **{"reference_steps": 200, "steps": 120, "batch_size": 16, "candidates": 8},
            "eval_prompts": 20,  # all held-out ones; each has 584 responses, and all are scored
        },
        unread=("vocab_size",),
    ),
}
