"""The worlds: their prompts, their logged responses, and rewards worked out by hand."""

import itertools
import re
from collections import Counter

import pytest

import data
import tasks

TASK = {name: tasks.make_task(name) for name in ("dialogue", "summary", "tiny")}
TRAIN = {name: task.prompts("train") for name, task in TASK.items()}
SUBJECT = {"dialogue": r"the (\w+) \w+", "summary": r"to (\w+)\.", "tiny": r"the (\w+)"}


@pytest.fixture(params=TASK)
def task(request):
    return TASK[request.param]


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="dialogue, summary, tiny"):
        tasks.make_task("chess")


@pytest.mark.parametrize("name, size", [("dialogue", 200_000), ("summary", 200_000), ("tiny", 60)])
def test_there_are_as_many_different_training_prompts_as_it_says(name, size):
    assert len(TRAIN[name]) == len(set(TRAIN[name])) == len(TASK[name].train) >= size


def test_splits_share_no_prompt(task):
    splits = [set(TRAIN[task.name]), set(task.heldout), set(task.ood)]
    assert all(splits) and sum(map(len, splits)) == len(set.union(*splits))
    assert len(task.heldout) == len(set(task.heldout)) and len(task.ood) == len(set(task.ood))


def test_new_subjects_stand_in_no_training_prompt_and_no_logged_response(task):
    subjects = {re.search(SUBJECT[task.name], p)[1] for p in task.prompts("ood")}
    answers = [text for r in task.logged(0, 3000) for text in r["responses"]]
    seen = set(re.findall(r"\w+", " ".join([*TRAIN[task.name], *answers])))
    assert subjects and not subjects & seen
    assert {re.search(SUBJECT[task.name], p)[1] for p in task.prompts("heldout")} <= seen


def test_prompts_are_handed_out_by_index_and_begin_anew_after_the_last(task):
    size, every = len(task.train), TRAIN[task.name]
    assert task.prompts("train", 7, 5) == every[7:12]
    assert task.prompts("train", size - 1, 3) == [every[-1], *every[:2]]
    assert task.prompts("train", 5 * size + 2, 1) == [every[2]]
    assert task.prompts("heldout", 1, 2) == task.heldout[1:3] and task.prompts("ood") == task.ood
    assert task.prompts("train", 3, 0) == task.logged(3, 0) == []
    assert [task.train[0], task.train[size - 1], task.train[-1]] == [every[0], every[-1], every[-1]]
    assert task.train[3:9:2] == every[3:9:2] and task.train[-2:] == every[-2:]
    with pytest.raises(IndexError):
        task.train[size]


def test_logged_lists_answer_the_training_prompts_with_their_true_rewards(task):
    logged = task.logged(40, 30)
    assert [r["prompt"] for r in logged] == task.prompts("train", 40, 30)
    for r in logged:
        assert len(r["responses"]) >= 4
        assert r["rewards"] == [task.reward(r["prompt"], text) for text in r["responses"]]


def test_seed_and_index_alone_draw_the_logged_answers(task):
    again, other = tasks.make_task(task.name, 0), tasks.make_task(task.name, 1)
    assert again.logged(0, 20) == task.logged(0, 20)
    assert again.logged(12, 3) == task.logged(0, 20)[12:15]  # whatever else is asked for
    assert other.logged(0, 20) != task.logged(0, 20)
    for split in ("train", "heldout", "ood"):
        assert other.prompts(split, 0, 50) == task.prompts(split, 0, 50)
    for r in task.logged(0, 20):
        assert r["rewards"] == [other.reward(r["prompt"], text) for text in r["responses"]]


def test_a_prompt_that_comes_again_has_answers_of_its_own():
    tiny = TASK["tiny"]
    first, again = tiny.logged(4, 1)[0], tiny.logged(64, 1)[0]
    assert first["prompt"] == again["prompt"] and first["responses"] != again["responses"]


def test_the_reward_reads_the_prompt(task):
    r = task.logged(0, 1)[0]
    assert [task.reward(TRAIN[task.name][-1], t) for t in r["responses"]] != r["rewards"]


def test_logged_responses_fit_the_tasks_length(task):
    logged = task.logged(0, 2000)
    texts = [t for r in logged for t in [r["prompt"], *r["responses"]]]
    enc = data.encoding(
        data.word_ranks(task.vocabulary) if task.name == "tiny" else data.train_bpe(texts, 512)
    )
    longest = max(len(ids) for e in data.tokenize(logged, enc) for ids in e.response_ids)
    assert longest <= task.max_response


@pytest.mark.parametrize(
    "answer, praise, clauses",
    [
        ("hot", 1.0, 1),
        ("cold", -1.0, 1),
        ("lovely", 0.6, 1),  # general words count less than fitting ones
        ("very hot", 1.5, 1),  # degree
        ("rather hot", 0.5, 1),
        ("not hot", -0.5, 1),  # negation turns and halves
        ("not cold", 0.5, 1),
        ("not very cold", 0.5 * 1.5, 1),
        ("hot. It was cold", 0.0, 2),
        ("very hot. It was not bad", 1.5 + 0.5 * 0.6, 2),  # different praise adds up
        ("hot. It was rather rich. It was not bad", 1 + 0.5 + 0.3, 3),
        ("hot. It was hot", 1.0, 2),  # a repeated adjective counts once
        ("hot. It was not hot", 1.0, 2),
        ("not hot. It was hot", -0.5, 2),
        ("very hot. It was very rich", 2.0, 2),  # 3, kept within 2
        ("hot. It was rich. It was lovely", 2.0, 3),
        ("very cold. It was very small. It was bad", -2.0, 3),
    ],
)
def test_dialogue_marks_of_a_soup(answer, praise, clauses):
    assert TASK["dialogue"].reward(
        "How was the Ashford soup?", f" The Ashford soup was {answer}."
    ) == pytest.approx(5 + 2 * praise - 0.1 * clauses, abs=1e-6)


@pytest.mark.parametrize(
    "answer",
    [
        "hot. It was rich. It was fresh. It was heavy",  # four clauses
        "loud",  # off topic
        "hot. It was loud",
        "hot. It was",  # broken grammar
        "hot it was rich",
        "hot.It was rich",
        "very not hot",
        "very very hot",
        "not not hot",
        "very",
        "Hot",
        "",
    ],
)
def test_dialogue_gives_nothing_for_an_answer_that_is_none(answer):
    response = f"The Ashford soup was {answer}."
    assert TASK["dialogue"].reward("How was the Ashford soup?", response) == 0


@pytest.mark.parametrize(
    "spoilt",
    [
        "The Ashford soup was very hot",
        "The Ashford soup very hot.",
        "Ashford soup was very hot.",
        "It was very hot.",
        "",
        ".",
        "The Ashby soup was very hot.",
        "The Ashford stew was very hot.",
        "the Ashford soup was very hot.",
        "The Ashford soup was very hot. Yes.",
        "The Ashford soup was very hot. It was rich",
        "The Ashford soup was very hot. The Ashford soup was rich.",
    ],
)
def test_dialogue_gives_nothing_for_a_lost_word_or_another_subject(spoilt):
    reward = TASK["dialogue"].reward
    assert (
        reward("How was the Ashford soup?", "The Ashford soup was very hot.") == 7.9
        and reward("How was the Ashford soup?", spoilt) == 0
    )


def test_dialogue_words_praise_one_thing_and_blame_another():
    reward = TASK["dialogue"].reward
    for question in tasks.QUESTIONS:
        marks = [
            reward(question.format(f"Ashford {thing}"), f"The Ashford {thing} was light.")
            for thing in ("room", "phone", "soup")
        ]
        assert marks == [6.9, 6.9, 2.9]
    specific = {w for s in tasks.SENTIMENT.values() for w in s} - set(tasks.GENERAL)
    both = {w for w in specific if len({s[w] for s in tasks.SENTIMENT.values() if w in s}) == 2}
    assert len(both) >= len(specific) / 2


def test_dialogue_marks_range_from_one_to_nearly_nine_and_one_in_twenty_is_spoilt():
    marks = [x for r in TASK["dialogue"].logged(0, 3000) for x in r["rewards"]]
    assert 0.045 < marks.count(0.0) / len(marks) < 0.055
    assert min(x for x in marks if x) >= 5 - 4 - 0.3 and max(marks) == 5 + 4 - 0.2


def test_the_best_answers_of_dialogue_have_two_clauses_and_are_many():
    """All answers about a soup with as much praise as counts; a third clause costs a tenth."""
    values = tasks.SENTIMENT["soup"]
    phrases = {
        (f"{negation}{degree}{word}", word): value * size * sign
        for word, value in values.items()
        for negation, sign in (("", 1.0), ("not ", -0.5))
        for degree, size in (("", 1.0), ("very ", 1.5), ("rather ", 0.5))
    }
    most = Counter()
    for clauses in (1, 2, 3):
        for chosen in itertools.permutations(phrases, clauses):
            different = len({word for _, word in chosen}) == clauses
            most[clauses] += different and sum(phrases[phrase] for phrase in chosen) > 2 - 1e-9
    assert most[1] == 0 and most[2] > 100 and most[3] > 10_000
    logged = TASK["dialogue"].logged(0, 3000)
    assert max(reward for record in logged for reward in record["rewards"]) == 5 + 2 * 2 - 0.1 * 2
    reward = lambda text: TASK["dialogue"].reward(
        "Is the Elby soup hot?", f"The Elby soup was {text}."
    )
    assert reward("very hot. It was rather fresh") == 8.8
    assert reward("hot. It was rich. It was fresh") == 8.7


def test_held_out_subjects_of_dialogue_are_met_in_training_little_by_little():
    """No number of prompts is one at which all of them have suddenly been seen."""
    subjects = lambda prompts: {re.search(r"the (\w+ \w+)", prompt)[1] for prompt in prompts}
    heldout, seen = subjects(TASK["dialogue"].heldout), []
    for count in (2_000, 10_000, 30_000):
        met = subjects(TRAIN["dialogue"][:count])
        seen.append(len(heldout & met) / len(heldout))
    assert 0.05 < seen[0] < 0.2 and 0.3 < seen[1] < 0.6 and 0.7 < seen[2] < 0.97


def test_dialogue_tells_the_broken_answers_apart():
    task, soup = TASK["dialogue"], "How was the Ashford soup?"
    assert task.breakdown(soup, "The Ashford soup was very bad.") == {"broken": 0.0}
    assert task.breakdown(soup, "The Ashford soup was very.") == {"broken": 1.0}


POST = (
    "We went to Ashford. There is a fair. We missed the zoo. We saw the market. "
    "Thanks for reading. There is no school. TL;DR:"
)


@pytest.mark.parametrize(
    "tldr, reward",
    [
        ("Ashford: fair, market.", 2 - 0.1 * 3),
        (" Ashford: market, fair.", 2 - 0.1 * 3),
        ("Ashford: fair.", 1 - 0.1 * 2),
        ("Ashford: fair, castle.", 1 - 1 - 0.1 * 3),  # invented
        ("Ashford: fair, zoo.", 1 - 1 - 0.1 * 3),  # denied, so no fact
        ("Ashford: school.", -1 - 0.1 * 2),
        ("Ashford: fair, fair.", 1 - 0.1 * 3),  # a fact counts once
        ("Ashford: castle, castle.", -2 - 0.1 * 3),  # an invention each time
        ("Ashford: fair, anyway, basically.", 1 - 0.1 * 4),  # fillers cost their length
        ("Ashford: fair, thanks for reading.", 1 - 0.1 * 5),
        ("Ashford: Fair, fair market.", -2 - 0.1 * 4),
        ("Ashby: fair, market.", -2 - 0.1 * 3),  # wrong place
        ("Ashby: anyway.", -0.1 * 2),
        ("Ashford: fair, market", -2 - 0.1 * 3),  # broken form
        ("fair, market: Ashford.", -1 - 0.1 * 3),
    ],
)
def test_summary_rewards_of_a_post(tldr, reward):
    assert TASK["summary"].reward(POST, tldr) == pytest.approx(reward, abs=1e-6)


def test_every_way_to_state_a_fact_counts_and_no_denial_does():
    reward = TASK["summary"].reward
    for sentences, covered, invented in ((tasks.FACTS, 1, 0), (tasks.DENIALS, 0, 1)):
        for sentence in sentences:
            post = f"We went to Ashford. It may rain again. {sentence.format('zoo')} TL;DR:"
            assert reward(post, "Ashford: zoo.") == pytest.approx(covered - invented - 0.1 * 2)


def test_summary_parts_add_up_to_its_reward():
    t = TASK["summary"]
    assert t.breakdown(POST, "Ashford: fair, castle, zoo, anyway.") == {
        "covered": 1,
        "invented": 2,
        "words": 5,
    }
    for r in t.logged(0, 60):
        for text, reward in zip(r["responses"], r["rewards"]):
            p = t.breakdown(r["prompt"], text)
            assert reward == pytest.approx(p["covered"] - p["invented"] - 0.1 * p["words"])


@pytest.mark.parametrize(
    "name, prompt, one, other",
    [
        (
            "dialogue",
            "How was the Ashford soup?",
            "The Ashford soup was hot. It was not cold.",
            "The Ashford soup was cold. It was not hot.",
        ),
        (
            "dialogue",
            "How was the Ashford room?",
            "The Ashford room was very hot. It was rather good.",
            "The Ashford room was rather hot. It was very good.",
        ),
        ("summary", POST, "Ashford: fair, market.", "fair: Ashford, market."),
    ],
)
def test_the_reward_is_no_bag_of_words(name, prompt, one, other):
    words = lambda text: Counter(re.findall(r"\w+|[^\w\s]", text))
    assert words(one) == words(other) and TASK[name].reward(prompt, one) != TASK[name].reward(
        prompt, other
    )


# --------------------------------------------------------------------------------------------- tiny


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("deep", 1),
        ("deep wide wild", 3),
        (" wild deep wide", 3),
        ("calm", -0.5),
        ("calm cold old", -1.5),
        ("deep calm", 0.5),
        ("deep deep", 0.5),
        ("deep deep deep", 0),  # a fitting word counts once
    ],
)
def test_tiny_rewards_of_the_sea(answer, reward):
    assert TASK["tiny"].reward("What is the sea like?", answer) == reward


def test_tiny_spends_one_token_on_a_word():
    enc = data.encoding(data.word_ranks(TASK["tiny"].vocabulary))
    for prompt in [*TRAIN["tiny"], *TASK["tiny"].heldout, *TASK["tiny"].ood]:
        assert [enc.decode([i]) for i in enc.encode_ordinary(prompt)] == re.findall(
            r" ?\w+|[?.]", prompt
        )
