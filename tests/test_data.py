"""Records split, tokenised and batched."""

import base64
import hashlib
import random
import sys
from functools import partial
from itertools import product

import bpe_speed
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import tasks

quickly = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def record(prompt, responses, rewards):
    return {"prompt": prompt, "responses": responses, "rewards": rewards}


def test_a_prompt_is_held_out_by_its_text_alone():
    records = [record(f"Question {i}?", ["Calm.", "Wet."], [i, 0]) for i in range(2000)]
    train, held = data.split(records)
    assert 0.08 < len(held) / 2000 < 0.12
    first_32_bits = lambda row: hashlib.sha256(row["prompt"].encode()).digest()[:4]
    assert held == [r for r in records if int.from_bytes(first_32_bits(r), "big") / 2**32 < 0.1]
    assert sorted(train + held, key=records.index) == records
    others = [record(r["prompt"], ["Else."], [0]) for r in reversed(records[::3])]
    assert {r["prompt"] for r in data.split(others)[1]} == {r["prompt"] for r in held} & {
        r["prompt"] for r in others
    }
    assert {r["prompt"] for r in held} <= {r["prompt"] for r in data.split(records, 0.3)[1]}


# ------------------------------------------------------------------------------------------- tokens

LETTERS = data.encoding(data.train_bpe([], 257))  # every byte a token, EOS is 256


def joined(ids):
    return LETTERS.decode(ids)


BPE_TEXTS = {
    "ties": ["ab cd ab cd dc ba dc ba", "zy xw"],
    "runs of one letter": ["aaaa aaaaa aaaaaaa aa aaa", "bbbaaabbb"],
    "pairs that overlap": ["abc abc bc bc bc ab ab ab xabc aabc abcc"],
    "no pair twice": ["abcdefg"],
    "nothing": [""],
    "punctuation, numbers and white space": [
        "Wait... what?!  12 + 34 = 46\n\n\tdef f(x):\n        return x_1 + x_2\n" * 3
    ],
    "other scripts": ["naïve café, 日本語日本語 и кириллица и 🙂🙂🙂🙂 e\u0301e\u0301"],
    "a task": [
        t for r in tasks.make_task("dialogue").logged(0, 30) for t in [r["prompt"], *r["responses"]]
    ],
}


@pytest.mark.parametrize("case", BPE_TEXTS)
def test_bpe_equals_the_naive_loop(case):
    texts = BPE_TEXTS[case]
    for size in (257, 263, 331):
        ranks = data.train_bpe(texts, size)
        assert list(ranks.items()) == list(oracle.naive_bpe(texts, size, data.SPLIT).items())
        assert len(ranks) < size


@quickly
@given(texts=st.lists(st.text("aab .", max_size=40), max_size=4))
def test_bpe_equals_the_naive_loop_on_random_texts(texts):
    assert list(data.train_bpe(texts, 300).items()) == list(
        oracle.naive_bpe(texts, 300, data.SPLIT).items()
    )


ALPHABETS = ["a", "ab", "aaab ", "abcd. ", "éè日本 ", "🙂🙃a\n", "0_ -\t"]  # ties, runs, long bytes


@settings(quickly, max_examples=200)
@given(
    texts=st.lists(
        st.sampled_from(ALPHABETS).flatmap(lambda x: st.text(x, max_size=150)), max_size=3
    ),
    times=st.integers(1, 3),
    size=st.sampled_from([257, 258, 263, 290, 400]),
)
def test_bpe_equals_the_naive_loop_on_runs_and_on_other_scripts(texts, times, size):
    texts = texts * times  # words that occur more than once
    assert list(data.train_bpe(texts, size).items()) == list(
        oracle.naive_bpe(texts, size, data.SPLIT).items()
    )


def test_bpe_equals_the_naive_loop_on_longer_texts():
    texts = [bpe_speed.english_like(6_000, kinds=300)[0], bpe_speed.chinese_like(1, kinds=30)[0]]
    for text in (*texts, "".join(random.Random(0).choices("ab", k=3000))):
        assert list(data.train_bpe([text], 400).items()) == list(
            oracle.naive_bpe([text], 400, data.SPLIT).items()
        )


def steps_of(function, most):
    """Lines, turns of comprehensions, calls and returns of Python code; fails after `most`."""
    steps, before = 0, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal steps
        steps += 1
        assert steps <= most, f"more than {most} steps"
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return steps


LONG_WORDS = {
    "letters": "".join(random.Random(0).choices("etaoinshrdlucmfw", k=16_000)),
    "one letter": "a" * 16_000,
    "a word again and again": "abcdefg" * 2_000,
    "white space": " " * 16_000,
    "Chinese without a space": bpe_speed.chinese_like(9_000)[0],
    "Chinese": "".join(bpe_speed.chinese_like(27_000)),
}


@pytest.mark.parametrize("case", LONG_WORDS)
def test_bpe_takes_a_like_number_of_steps_a_byte_in_a_word_of_any_length(case):
    """About 30; a pass over the word, or over all pairs, at every join would take thousands."""
    text = LONG_WORDS[case]
    for part in (text[: len(text) // 8], text):
        size = len(part.encode())
        for vocab_size in (512, 4096):
            steps_of(partial(data.train_bpe, [part], vocab_size), most=60 * size)


def test_the_table_of_speeds_has_two_rows_for_each_text_and_size(capsys):
    texts = [("letters", partial(bpe_speed.english_like, kinds=50), 0.001, 2)]
    bpe_speed.main(sizes=(257, 300), texts=texts)
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[2], "(2.3)" in row) for row in rows] == [
        ("letters", size, growth) for size in ("257", "300") for growth in (False, True)
    ]


def test_bpe_stops_where_no_pair_occurs_twice_and_reads_no_more_than_it_may():
    assert list(data.train_bpe(["aaab aaab"], 300))[256:] == [b"aa", b"ab", b"aaab"]
    assert list(data.train_bpe(["abab", "cdcd"], 300, max_bytes=4))[256:] == [b"ab"]


def test_a_vocabulary_without_room_for_bytes_and_eos_is_refused():
    with pytest.raises(ValueError, match="256"):
        data.train_bpe(["text"], 256)
    assert LETTERS.n_vocab == 257 and LETTERS.eot_token == 256


ENCODING = data.encoding(data.train_bpe(BPE_TEXTS["a task"] + BPE_TEXTS["other scripts"], 400))


@settings(quickly, max_examples=300)
@given(text=st.text(max_size=60))
def test_every_text_survives_encoding(text):
    ids = ENCODING.encode_ordinary(text)
    assert ENCODING.decode(ids) == text and ENCODING.eot_token not in ids


def test_end_of_text_inside_a_text_is_ordinary_text():
    text = f" The pond {data.EOS} is calm."
    (e,) = data.tokenize([record(data.EOS, [text], [1.0])], ENCODING)
    assert ENCODING.eot_token not in e.prompt_ids and ENCODING.decode(e.prompt_ids) == data.EOS
    assert (
        e.response_ids[0].count(ENCODING.eot_token) == 1
        and ENCODING.decode(e.response_ids[0][:-1]) == text
    )


def test_ranks_are_saved_as_plain_text_and_read_anew_each_time(tmp_path):
    for texts in (["abab abab"], ["cdcd cdcd"]):
        ranks = data.train_bpe(texts, 300)
        data.save_ranks(ranks, tmp_path / "ranks")
        assert list(data.load_ranks(tmp_path / "ranks").items()) == list(ranks.items())
        assert (tmp_path / "ranks").read_text().splitlines()[
            256
        ] == f"{base64.b64encode(texts[0][:2].encode()).decode()} 256"


def test_gpt2s_vocabulary_that_cannot_be_downloaded_is_one_line_with_the_way_out(monkeypatch):
    def fail(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(data.tiktoken, "get_encoding", fail)
    with pytest.raises(data.DataError, match="TIKTOKEN_CACHE_DIR"):
        data.gpt2_encoding()


@pytest.mark.parametrize(
    "prompt, response, told",
    [
        ("How?", "Fine.", " Fine."),
        ("How? ", "Fine.", "Fine."),
        ("How?\n", "Fine.", "Fine."),
        ("How?", " Fine.", " Fine."),
        ("How?", "\nFine.", "\nFine."),
    ],
)
def test_one_space_is_added_where_neither_side_has_white_space(prompt, response, told):
    news = []
    (e,) = data.tokenize([record(prompt, [response], [1.0])], LETTERS, say=news.append)
    assert joined(e.prompt_ids) == prompt and joined(e.response_ids[0][:-1]) == told
    assert len(news) == (told != response)


def test_a_long_prompt_loses_its_beginning_and_a_long_response_its_end_and_its_eos():
    news, eos = [], LETTERS.eot_token
    records = [
        record("abcdef", [" uvw", " xyz!"], [1, 2]),
        record("pq", [" r"], [3]),
    ]
    long, short = data.tokenize(records, LETTERS, max_prompt=3, max_response=5, say=news.append)
    assert joined(long.prompt_ids) == "def" and joined(short.prompt_ids) == "pq"
    assert long.response_ids == [[*b" uvw", eos], [*b" xyz!"]] and short.response_ids == [
        [*b" r", eos]
    ]
    assert (long.rewards, short.rewards) == ([1, 2], [3])
    assert any("50.0% of the prompts" in line and "33.3% of the responses" in line for line in news)
    (one,) = data.tokenize(records[:1], LETTERS, max_prompt=1, max_response=1)
    assert joined(one.prompt_ids) == "f" and one.response_ids == [[*b" "], [*b" "]]
    (whole,) = data.tokenize(records[:1], LETTERS)
    assert joined(whole.prompt_ids) == "abcdef" and whole.response_ids[1] == [*b" xyz!", eos]


@pytest.mark.parametrize(
    "prompt, response, said",
    [
        ("How? ", " Fine.", "2 of 3 responses begin with a space after a prompt that ends in one"),
        ("How?\n", " Fine.", ""),
        ("How? ", "Fine.", ""),
        ("How?", " Fine.", ""),
    ],
)
def test_a_double_space_at_the_seam_is_said(prompt, response, said):
    news = []
    lists = [record(prompt, [response, response], [1, 2]), record("Why?", [" So."], [1])]
    data.tokenize(lists, LETTERS, say=news.append)
    assert news == ([said] if said else [])


@pytest.mark.parametrize("mark", data.END_MARKS)
def test_end_marks_that_responses_bring_along_are_said(mark):
    news = []
    lists = [record("How?", [f" Fine.{mark}", " Fine."], [1, 2]), record("Why?", [mark], [1])]
    examples = data.tokenize(lists, LETTERS, say=news.append)
    assert any(f"2 of 3 responses end in {mark}, which is ordinary text" in line for line in news)
    assert joined(examples[0].response_ids[0][:-1]) == f" Fine.{mark}"


# ------------------------------------------------------------------------------------------ batches


def make_examples(ref_logps=False):
    """Two lists, S = 7, M = 3, R = 5; id 11 is EOS."""
    lists = [
        data.Example(
            "a", [1, 2, 3, 4, 5, 6, 7], [[1, 2, 3, 4, 11], [5, 11], [11]], [0.5, -1.0, 2.0]
        ),
        data.Example("b", [8, 9, 10], [[6, 7, 8, 11], [1, 2, 3, 4, 5]], [3.0, 0.0]),
    ]
    if ref_logps:
        lists[0].ref_logps, lists[1].ref_logps = [-1.0, -2.0, -3.0], [-4.0, -5.0]
    return lists


def test_a_batch_holds_every_token_under_its_mask_and_eos_elsewhere():
    examples = make_examples()
    b = data.make_batch(examples, eos=11)
    assert b.prompt_ids.shape == b.prompt_mask.shape == (
        2,
        7,
    ) and b.response_ids.shape == b.response_mask.shape == (
        2,
        3,
        5,
    )
    assert b.prompt_mask.sum(-1).tolist() == [7, 3] and b.response_mask.sum(-1).tolist() == [
        [5, 2, 1],
        [4, 5, 0],
    ]
    assert b.candidate_mask.tolist() == [[True, True, True], [True, True, False]]
    assert b.rewards.tolist() == [[0.5, -1.0, 2.0], [3.0, 0.0, 0.0]] and b.ref_logps is None
    for i, e in enumerate(examples):
        assert b.prompt_ids[i][b.prompt_mask[i]].tolist() == e.prompt_ids
        for j, ids in enumerate(e.response_ids):
            assert b.response_ids[i, j][b.response_mask[i, j]].tolist() == ids
    assert (b.prompt_ids[~b.prompt_mask] == 11).all() and (
        b.response_ids[~b.response_mask] == 11
    ).all()
    assert b.rewards.dtype == torch.float32 and all(
        m.dtype == torch.bool for m in (b.prompt_mask, b.response_mask, b.candidate_mask)
    )


def test_reference_log_probs_are_batched_where_every_list_has_them():
    assert data.make_batch(make_examples(ref_logps=True), eos=11).ref_logps.tolist() == [
        [-1.0, -2.0, -3.0],
        [-4.0, -5.0, 0.0],
    ]
    assert (
        data.make_batch(make_examples(ref_logps=True)[:1] + make_examples()[1:], eos=11).ref_logps
        is None
    )


def sized_examples(number):
    draw = random.Random(number)
    return [
        data.Example("", [1] * draw.randint(1, 40), [[2] * draw.randint(1, 9)], [0.0])
        for _ in range(number)
    ]


@quickly
@given(number=st.integers(1, 90), batch_size=st.integers(1, 7), seed=st.integers(0, 99))
def test_an_epoch_covers_every_example_exactly_once_and_follows_its_generator(
    number, batch_size, seed
):
    examples = sized_examples(number)
    order = lambda: data.batch_order(examples, batch_size, torch.Generator().manual_seed(seed))
    assert sorted(i for batch in order() for i in batch) == list(range(number))
    full, rest = divmod(number, batch_size)
    assert sorted(map(len, order())) == sorted([batch_size] * full + [rest] * bool(rest))
    assert order() == order()


def test_another_generator_gives_another_order_and_alike_lengths_share_a_batch():
    examples, generator = sized_examples(331), torch.Generator().manual_seed(0)
    one, other = data.batch_order(examples, 7, generator), data.batch_order(examples, 7, generator)
    assert (
        one != other
        and len({tuple(sorted(b)) for b in one} & {tuple(sorted(b)) for b in other}) < 5
    )
    spread = lambda batches: sum(
        max(lengths) - min(lengths)
        for lengths in ([len(examples[i].prompt_ids) for i in b] for b in batches)
    )
    assert spread(one) < 0.6 * spread([list(range(i, i + 7)) for i in range(0, 322, 7)])


# ------------------------------------------------------------------------------- what a task allows


def test_tiny_has_584_responses_and_they_are_what_its_tokens_allow():
    task = tasks.make_task("tiny")
    enc = data.encoding(data.word_ranks(task.vocabulary))
    allowed, eos = data.allowed_tokens(task, enc, task.max_response), enc.eot_token
    assert allowed.shape == (task.max_response, enc.n_vocab) == (4, enc.n_vocab)
    choices = [row.nonzero().flatten().tolist() for row in allowed]
    assert choices[3] == [eos] and eos not in choices[0] and eos in choices[1] and eos in choices[2]
    responses = {ids[: ids.index(eos)] for ids in product(*choices)}
    assert len(responses) == 8 + 8**2 + 8**3 == 584
    sentences = {
        "".join(f" {w}" for w in words)
        for n in (1, 2, 3)
        for words in product(task.words, repeat=n)
    }
    assert {enc.decode(list(ids)) for ids in responses} == sentences
    assert {
        tuple(ids[:-1]) for e in data.tokenize(task.logged(0, 240), enc) for ids in e.response_ids
    } <= responses


def test_other_tasks_allow_every_token():
    for name in ("dialogue", "summary"):
        task = tasks.make_task(name)
        assert data.allowed_tokens(task, ENCODING, task.max_response) is None
