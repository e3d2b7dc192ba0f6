"""The worlds: their prompts, their logged responses, and rewards worked out by hand."""

import random
import re
from collections import Counter

import pytest

import data
import tasks

TASK = {name: tasks.make_task(name, random.Random(0)) for name in ("dialogue", "summary", "tiny")}
SUBJECT = {"dialogue": r"the (\w+) \w+", "summary": r"to (\w+)\.", "tiny": r"the (\w+)"}


@pytest.fixture(params=TASK)
def task(request):
    return TASK[request.param]


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="dialogue, summary, tiny"):
        tasks.make_task("chess", random.Random(0))


def test_splits_share_no_prompt(task):
    splits = [set(task.prompts[s]) for s in ("train", "heldout", "ood")]
    assert all(splits) and sum(map(len, splits)) == len(set.union(*splits))


def test_new_subjects_stand_in_no_training_prompt_and_no_logged_response(task):
    subjects = {re.search(SUBJECT[task.name], p)[1] for p in task.prompts["ood"]}
    seen = {
        w
        for r in task.logged
        for text in [r["prompt"], *r["responses"]]
        for w in re.findall(r"\w+", text)
    }
    assert subjects and not subjects & seen
    assert {re.search(SUBJECT[task.name], p)[1] for p in task.prompts["heldout"]} <= seen


def test_logged_lists_answer_the_training_prompts_with_their_true_rewards(task):
    assert {r["prompt"] for r in task.logged} == set(task.prompts["train"])
    for r in task.logged[::7]:
        assert r["rewards"] == [task.reward(r["prompt"], t) for t in r["responses"]]


def test_the_rng_draws_the_logged_responses_and_nothing_else(task):
    again, other = (
        tasks.make_task(task.name, random.Random(0)),
        tasks.make_task(task.name, random.Random(1)),
    )
    assert again.logged == task.logged and other.logged != task.logged
    assert again.prompts == other.prompts == task.prompts
    assert [other.reward(r["prompt"], t) for r in task.logged[::11] for t in r["responses"]] == [
        x for r in task.logged[::11] for x in r["rewards"]
    ]


def test_the_reward_reads_the_prompt(task):
    r = task.logged[0]
    assert [task.reward(task.prompts["train"][-1], t) for t in r["responses"]] != r["rewards"]


def test_logged_responses_fit_the_tasks_length(task):
    texts = [t for r in task.logged for t in [r["prompt"], *r["responses"]]]
    enc = data.encoding(
        data.word_ranks(task.vocabulary) if task.name == "tiny" else data.train_bpe(texts, 512)
    )
    longest = max(len(ids) for e in data.tokenize(task.logged, enc) for ids in e.response_ids)
    assert longest <= task.max_response


@pytest.mark.parametrize(
    "answer, marks",
    [
        ("hot", 5 + 3 * 1.0),
        ("cold", 5 - 3 * 1.0),
        ("lovely", 5 + 3 * 0.6),  # general words count less than fitting ones
        ("very hot", 5 + 3 * 1.5),  # degree
        ("rather hot", 5 + 3 * 0.5),
        ("not hot", 5 + 3 * -0.5),  # negation turns and halves
        ("not cold", 5 + 3 * 0.5),
        ("not very cold", 5 + 3 * 0.5 * 1.5),
        ("hot. It was cold", 5.0),  # mean over clauses
        ("very hot. It was not bad", 5 + 3 * (1.5 + 0.5 * 0.6) / 2),
        ("hot. It was rich. It was lovely", 5 + 3 * (1 + 1 + 0.6) / 3),
        ("hot. It was hot", 5 + 3 * 1 / 2),  # a repeated adjective counts once
        ("hot. It was not hot", 5 + 3 * 1 / 2),
        ("hot. It was rich. It was fresh. It was heavy", 0.0),  # four clauses
        ("loud", 0.0),  # off topic
        ("hot. It was loud", 0.0),
        ("hot. It was", 0.0),  # broken grammar
        ("hot it was rich", 0.0),
        ("hot.It was rich", 0.0),
        ("very not hot", 0.0),
        ("very very hot", 0.0),
        ("not not hot", 0.0),
        ("very", 0.0),
        ("Hot", 0.0),
        ("", 0.0),
    ],
)
def test_dialogue_marks_of_a_soup(answer, marks):
    assert TASK["dialogue"].reward(
        "How was the Ashford soup?", f" The Ashford soup was {answer}."
    ) == pytest.approx(marks, abs=1e-6)


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
        reward("How was the Ashford soup?", "The Ashford soup was very hot.") == 9.5
        and reward("How was the Ashford soup?", spoilt) == 0
    )


def test_dialogue_words_praise_one_thing_and_blame_another():
    reward = TASK["dialogue"].reward
    for question in tasks.QUESTIONS:
        marks = [
            reward(question.format(f"Ashford {thing}"), f"The Ashford {thing} was light.")
            for thing in ("room", "phone", "soup")
        ]
        assert marks == [8.0, 8.0, 2.0]
    specific = {w for s in tasks.SENTIMENT.values() for w in s} - set(tasks.GENERAL)
    both = {w for w in specific if len({s[w] for s in tasks.SENTIMENT.values() if w in s}) == 2}
    assert len(both) >= len(specific) / 2


def test_dialogue_marks_range_from_half_to_nine_and_a_half_and_one_in_twenty_is_spoilt():
    marks = [x for r in TASK["dialogue"].logged for x in r["rewards"]]
    assert 0.03 < marks.count(0.0) / len(marks) < 0.07
    assert min(x for x in marks if x) >= 0.5 and max(marks) <= 9.5


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
    for r in t.logged[::50]:
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
    for prompt in [p for split in TASK["tiny"].prompts.values() for p in split]:
        assert [enc.decode([i]) for i in enc.encode_ordinary(prompt)] == re.findall(
            r" ?\w+|[?.]", prompt
        )
