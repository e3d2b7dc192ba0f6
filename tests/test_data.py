"""Files, tokens, batches and the three synthetic tasks."""

import base64
import gzip
import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from itertools import product
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import tasks

DATA_DIR = Path(os.environ.get("LIRE_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
GOOD = {
    "prompt": "Describe the pond.",
    "responses": ["Calm.", "Wet.", "Soup."],
    "rewards": [1.7, 0.2, -2.1],
}
COPA = {
    "id": "1",
    "asks-for": "effect",
    "most-plausible-alternative": "2",
    "p": "The frog left.",
    "a1": "It rained soup.",
    "a2": "The pond was calm.",
    "human-explanations": [
        {"text": "Frogs make waves.", "filtered-avg-rating": 4.25},
        {"text": "Soup.", "filtered-avg-rating": 1},
    ],
}

quickly = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def write(folder, *lines, name="lists.jsonl"):
    """A file of these lines: records, strings or bytes."""
    path = folder / name
    raw = [
        x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode()
        for x in lines
    ]
    with (gzip.open if name.endswith(".gz") else open)(path, "wb") as f:
        f.write(b"".join(line + b"\n" for line in raw))
    return path


def load(*paths, **options):
    """Records and the lines of news."""
    news = []
    return data.load(paths, say=news.append, **options), news


def error(*paths, **options):
    with pytest.raises(data.DataError) as e:
        load(*paths, **options)
    return str(e.value)


def changed(record=GOOD, **fields):
    """The record with these fields replaced, or left out where they are None."""
    record = {**record, **{k.replace("_", "-"): v for k, v in fields.items()}}
    return {k: v for k, v in record.items() if v is not None}


# ------------------------------------------------------------------------------------------------------- files that are right

visible = st.text(min_size=1, max_size=20).filter(str.strip)
number = st.floats(-1e30, 1e30) | st.integers(-(10**6), 10**6)
scored = st.lists(st.tuples(visible, number), min_size=1, max_size=5)
record = st.builds(
    lambda prompt, lists: {
        "prompt": prompt,
        "responses": [t for t, _ in lists],
        "rewards": [r for _, r in lists],
    },
    visible,
    scored,
)


@quickly
@given(
    records=st.lists(record, min_size=1, max_size=5),
    ascii=st.booleans(),
    name=st.sampled_from(["lists.jsonl", "lists.jsonl.gz"]),
)
def test_canonical_records_come_back_as_they_were_written(tmp_path, records, ascii, name):
    path = write(tmp_path, *(json.dumps(r, ensure_ascii=ascii) for r in records), name=name)
    assert load(path)[0] == records


def test_files_are_read_in_the_order_given(tmp_path):
    a, b = (
        write(tmp_path, GOOD, name="a.jsonl"),
        write(tmp_path, changed(prompt="Second."), COPA | GOOD, name="b.jsonl.gz"),
    )
    assert [r["prompt"] for r in load(b, a)[0]] == ["Second.", GOOD["prompt"], GOOD["prompt"]]


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_no_obstacle(tmp_path):
    line = json.dumps(GOOD).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + line, b"", b"  \t", line + b"\r")
    assert load(path)[0] == [GOOD, GOOD]


def test_it_says_what_it_recognised_and_which_response_it_takes_for_the_best(tmp_path):
    (news,) = load(write(tmp_path, GOOD, GOOD))[1]
    assert (
        "canonical" in news and "2 prompts" in news and "6 responses" in news and "'Calm.'" in news
    )


def test_limit_keeps_the_first_lists(tmp_path):
    path = write(tmp_path, *(changed(prompt=f"{i}?") for i in range(5)))
    assert [r["prompt"] for r in load(path, limit=3)[0]] == ["0?", "1?", "2?"]
    assert len(load(path, limit=7)[0]) == 5


@pytest.mark.parametrize("limit", [3, 5, 7])
def test_limit_counts_over_all_files(tmp_path, limit):
    a, b = (
        write(tmp_path, *[GOOD] * 5, name="a.jsonl"),
        write(tmp_path, *[GOOD] * 5, name="b.jsonl"),
    )
    assert len(load(a, b, limit=limit)[0]) == limit


@pytest.mark.parametrize(
    "unusable",
    [
        changed(prompt="  "),
        changed(responses=["", "Wet.", "Soup."]),
        changed(responses=[], rewards=[]),
    ],
)
def test_up_to_5_percent_of_unusable_records_are_dropped_and_counted(tmp_path, unusable):
    path = write(tmp_path, GOOD, unusable, *[GOOD] * 18)
    records, news = load(path)
    assert records == [GOOD] * 19 and "1 of 20 records dropped" in news[0] and "lines 2" in news[0]
    assert error(write(tmp_path, GOOD, unusable, *[GOOD] * 17)).startswith(
        f"{path}:2: more than 5 %"
    )
    assert error(write(tmp_path, unusable)).startswith(f"{path}:1: ")


# ------------------------------------------------------------------------------------------------------- files that are wrong

BROKEN = {
    "not JSON": ("Describe the pond.", "not JSON"),
    "half a record": (json.dumps(GOOD)[:40], "not JSON"),
    "two records on a line": (json.dumps(GOOD) * 2, "not JSON"),
    "not an object": ("[1, 2]", "list instead of an object"),
    "null": ("null", "NoneType instead of an object"),
    "no prompt": (changed(prompt=None), "no field 'prompt'"),
    "no responses": (changed(responses=None), "no field 'responses'"),
    "no rewards": (changed(rewards=None), "no field 'rewards'"),
    "prompt of another type": (changed(prompt=["Describe the pond."]), "'prompt' is list"),
    "responses of another type": (changed(responses="Calm."), "'responses' is str"),
    "a response of another type": (
        changed(responses=["Calm.", "Wet.", 3]),
        "something else than strings",
    ),
    "too few rewards": (changed(rewards=[1.7, 0.2]), "3 responses and 2 rewards"),
    "too many rewards": (changed(rewards=[1.7, 0.2, -2.1, 0.0]), "3 responses and 4 rewards"),
    "nan": (changed(rewards=[1.7, math.nan, -2.1]), "reward 2 is nan"),
    "inf": (changed(rewards=[1.7, 0.2, math.inf]), "reward 3 is inf"),
    "a number beyond float64": (json.dumps(GOOD).replace("1.7", "1e999"), "reward 1 is inf"),
    "an integer beyond float64": (changed(rewards=[10**400, 0.2, -2.1]), "reward 1"),
    "an integer of 5000 digits": (json.dumps(GOOD).replace("1.7", "1" + "0" * 5000), ""),
    "brackets without end": ('{"prompt": ' + "[" * 100_000, ""),
    "a bool": (changed(rewards=[True, 0.2, -2.1]), "reward 1 is True"),
    "a string": (changed(rewards=["1.7", 0.2, -2.1]), "reward 1 is '1.7'"),
    "a missing reward": (changed(rewards=[None, 0.2, -2.1]), "reward 1 is None"),
    "Latin-1": (
        json.dumps(changed(prompt="caf\u00e9"), ensure_ascii=False).encode("latin-1"),
        "not UTF-8",
    ),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "byte order mark inside": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_with_its_file_and_number(tmp_path, case):
    line, what = BROKEN[case]
    path = write(tmp_path, GOOD, "", line, GOOD)
    message = error(path)
    assert message.startswith(f"{path}:3: ") and what in message and "\n" not in message


broken_copa = {
    "no premise": (changed(COPA, p=None), "no field 'p'"),
    "no right answer": (changed(COPA, a2=None), "no field 'a2'"),
    "asks for nothing": (changed(COPA, asks_for="reason"), "'asks-for' is 'reason'"),
    "a third answer": (changed(COPA, most_plausible_alternative="3"), "is '3'"),
    "no list": (changed(COPA, human_explanations={}), "is dict"),
    "not objects": (changed(COPA, human_explanations=["Soup."]), "objects"),
    "no rating": (changed(COPA, human_explanations=[{"text": "Soup."}]), "explanation 1 is None"),
    "no text": (changed(COPA, human_explanations=[{"filtered-avg-rating": 1}]), "no field 'text'"),
    "another format": (GOOD, "no field 'asks-for'"),
}


@pytest.mark.parametrize("case", broken_copa)
def test_a_broken_copa_line_is_named_with_its_file_and_number(tmp_path, case):
    line, what = broken_copa[case]
    path = write(tmp_path, COPA, line)
    assert error(path).startswith(f"{path}:2: ") and what in error(path)


def test_a_file_without_records_or_that_cannot_be_read_is_named(tmp_path):
    assert error(write(tmp_path)).startswith(f"{tmp_path / 'lists.jsonl'}:1: no record")
    assert error(write(tmp_path, "", " ")).startswith(f"{tmp_path / 'lists.jsonl'}:2: no record")
    assert error(write(tmp_path, b"\xef\xbb\xbf")).startswith(
        f"{tmp_path / 'lists.jsonl'}:1: no record"
    )
    assert error(tmp_path / "absent.jsonl").startswith(
        f"{tmp_path / 'absent.jsonl'}:1: No such file"
    )
    assert error(tmp_path).startswith(f"{tmp_path}:1: Is a directory")


def test_every_truncation_or_corruption_of_a_gz_file_ends_in_one_line(tmp_path):
    path = write(tmp_path, *(changed(prompt=f"{i}?") for i in range(7)), name="lists.jsonl.gz")
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert error(path).startswith(f"{path}:1: ")
    path.write_bytes(json.dumps(GOOD).encode())
    assert error(path).startswith(f"{path}:1: ")
    for n in range(
        whole.index(b"\0", 10) + 1, len(whole)
    ):  # a wrong byte after the header and the file name in it
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :])
        assert re.match(rf"{re.escape(str(path))}:\d+: ", error(path))


json_value = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
field = st.sampled_from(
    [
        "prompt",
        "responses",
        "rewards",
        "human-explanations",
        "asks-for",
        "most-plausible-alternative",
        "p",
        "a2",
    ]
)
mutated = st.builds(
    lambda base, name, value: json.dumps({**base, name: value}).encode(),
    st.sampled_from([GOOD, COPA]),
    field,
    json_value,
)
cut = st.builds(lambda n: json.dumps(GOOD).encode()[:n], st.integers(1, len(json.dumps(GOOD)) - 1))


@quickly
@given(
    line=cut | json_value.filter(lambda v: not isinstance(v, dict)).map(json.dumps).map(str.encode)
)
def test_a_line_that_is_no_record_always_ends_the_load_at_its_number(tmp_path, line):
    path = write(tmp_path, GOOD, GOOD, line)
    assert error(path).startswith(f"{path}:3: ")


@settings(quickly, max_examples=200)
@given(lines=st.lists(mutated | st.binary(max_size=30) | cut, min_size=1, max_size=3))
def test_whatever_a_file_holds_it_is_read_or_refused_with_file_and_line(tmp_path, lines):
    path = write(tmp_path, *lines)
    try:
        records, _ = load(path)
    except data.DataError as e:
        assert re.fullmatch(rf"{re.escape(str(path))}:\d+: \S.*", str(e))
    else:
        for r in records:
            assert r["prompt"].strip() and r["responses"] and all(t.strip() for t in r["responses"])
            assert len(r["responses"]) == len(r["rewards"]) and all(
                map(math.isfinite, r["rewards"])
            )


# ------------------------------------------------------------------------------------------------------------ COPA-SSE, splits


def test_copa_sse_asks_why_or_so_what_of_the_right_answer(tmp_path):
    cause = changed(COPA, asks_for="cause", most_plausible_alternative=1)
    records, (news,) = load(write(tmp_path, COPA, cause))
    texts = {"responses": ["Frogs make waves.", "Soup."], "rewards": [4.25, 1.0]}
    assert records == [
        {"prompt": "The frog left. So what? The pond was calm.", **texts},
        {"prompt": "The frog left. Why? It rained soup.", **texts},
    ]
    assert "COPA-SSE" in news and "'Frogs make waves.'" in news


def test_copa_sse_itself_equals_its_canonical_form():
    theirs, ours = DATA_DIR / "copa_sse" / "dev-explained.jsonl", DATA_DIR / "copa_sse_dev.jsonl"
    if not (theirs.exists() and ours.exists()):
        pytest.skip(f"no COPA-SSE under {DATA_DIR}: set LIRE_DATA_DIR")
    (a, _), (b, _) = load(theirs), load(ours)
    assert len(a) == len(b) == 1000 and sum(len(r["responses"]) for r in a) == 6579
    for x, y in zip(a, b):
        assert (x["prompt"], x["responses"]) == (y["prompt"], y["responses"]) and x[
            "rewards"
        ] == pytest.approx(y["rewards"], abs=1e-4)


def test_a_prompt_is_held_out_by_its_text_alone():
    records = [changed(prompt=f"Question {i}?", rewards=[i, 0, 0]) for i in range(2000)]
    train, held = data.split(records)
    assert 0.08 < len(held) / 2000 < 0.12
    first_32_bits = lambda r: hashlib.sha256(r["prompt"].encode()).digest()[:4]
    assert held == [r for r in records if int.from_bytes(first_32_bits(r), "big") / 2**32 < 0.1]
    assert sorted(train + held, key=records.index) == records
    others = [changed(r, responses=["Else."], rewards=[0]) for r in reversed(records[::3])]
    assert {r["prompt"] for r in data.split(others)[1]} == {r["prompt"] for r in held} & {
        r["prompt"] for r in others
    }
    assert {r["prompt"] for r in held} <= {r["prompt"] for r in data.split(records, 0.3)[1]}


# -------------------------------------------------------------------------------------------------------------------- tokens

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
        t
        for r in data.make_task("dialogue", random.Random(0)).logged[::60]
        for t in [r["prompt"], *r["responses"]]
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


def test_bpe_stops_where_no_pair_occurs_twice_and_reads_no_more_than_it_may():
    assert list(data.train_bpe(["aaab aaab"], 300))[256:] == [b"aa", b"ab", b"aaab"]
    assert list(data.train_bpe(["abab", "cdcd"], 300, max_bytes=4))[256:] == [b"ab"]


def test_a_vocabulary_without_room_for_bytes_and_eos_is_refused():
    with pytest.raises(ValueError, match="256"):
        data.train_bpe(["text"], 256)
    assert LETTERS.n_vocab == 257 and LETTERS.eot_token == 256


SMALL = data.encoding(data.train_bpe(BPE_TEXTS["a task"] + BPE_TEXTS["other scripts"], 400))


@settings(quickly, max_examples=300)
@given(text=st.text(max_size=60))
def test_every_text_survives_encoding(text):
    ids = SMALL.encode_ordinary(text)
    assert SMALL.decode(ids) == text and SMALL.eot_token not in ids


def test_end_of_text_inside_a_text_is_ordinary_text():
    text = f" The pond {data.EOS} is calm."
    (e,) = data.tokenize([changed(prompt=data.EOS, responses=[text], rewards=[1.0])], SMALL)
    assert SMALL.eot_token not in e.prompt_ids and SMALL.decode(e.prompt_ids) == data.EOS
    assert (
        e.response_ids[0].count(SMALL.eot_token) == 1
        and SMALL.decode(e.response_ids[0][:-1]) == text
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
    (e,) = data.tokenize(
        [changed(prompt=prompt, responses=[response], rewards=[1.0])], LETTERS, say=news.append
    )
    assert joined(e.prompt_ids) == prompt and joined(e.response_ids[0][:-1]) == told
    assert len(news) == (told != response)


def test_a_long_prompt_loses_its_beginning_and_a_long_response_its_end_and_its_eos():
    news, eos = [], LETTERS.eot_token
    records = [
        changed(prompt="abcdef", responses=[" uvw", " xyz!"], rewards=[1, 2]),
        changed(prompt="pq", responses=[" r"], rewards=[3]),
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


# ------------------------------------------------------------------------------------------------------------------- batches


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


def sized_examples(n):
    draw = random.Random(n)
    return [
        data.Example("", [1] * draw.randint(1, 40), [[2] * draw.randint(1, 9)], [0.0])
        for _ in range(n)
    ]


@quickly
@given(n=st.integers(1, 90), batch_size=st.integers(1, 7), seed=st.integers(0, 99))
def test_an_epoch_covers_every_example_exactly_once_and_follows_its_generator(n, batch_size, seed):
    examples = sized_examples(n)
    order = lambda: data.batch_order(examples, batch_size, torch.Generator().manual_seed(seed))
    assert sorted(i for batch in order() for i in batch) == list(range(n))
    assert sorted(map(len, order())) == sorted(
        [batch_size] * (n // batch_size) + [n % batch_size] * bool(n % batch_size)
    )
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


# --------------------------------------------------------------------------------------------------------------------- tasks

TASK = {name: data.make_task(name, random.Random(0)) for name in ("dialogue", "summary", "tiny")}
SUBJECT = {"dialogue": r"the (\w+) \w+", "summary": r"to (\w+)\.", "tiny": r"the (\w+)"}


@pytest.fixture(params=TASK)
def task(request):
    return TASK[request.param]


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="dialogue, summary, tiny"):
        data.make_task("chess", random.Random(0))


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
        data.make_task(task.name, random.Random(0)),
        data.make_task(task.name, random.Random(1)),
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


def test_dialogue_marks_range_from_half_a_mark_to_nine_and_a_half_and_one_answer_in_twenty_is_spoilt():
    marks = [x for r in TASK["dialogue"].logged for x in r["rewards"]]
    assert 0.03 < marks.count(0.0) / len(marks) < 0.07
    assert min(x for x in marks if x) >= 0.5 and max(marks) <= 9.5


POST = "We went to Ashford. There is a fair. We missed the zoo. We saw the market. Thanks for reading. There is no school. TL;DR:"


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


# ---------------------------------------------------------------------------------------------------------------------- tiny


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


def test_tiny_has_584_responses_and_they_are_what_its_tokens_allow():
    task = TASK["tiny"]
    enc = data.encoding(data.word_ranks(task.vocabulary))
    allowed, eos = data.allowed_tokens(task, enc), enc.eot_token
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
        tuple(ids[:-1]) for e in data.tokenize(task.logged, enc) for ids in e.response_ids
    } <= responses


def test_tiny_spends_one_token_on_a_word():
    enc = data.encoding(data.word_ranks(TASK["tiny"].vocabulary))
    for prompt in [p for split in TASK["tiny"].prompts.values() for p in split]:
        assert [enc.decode([i]) for i in enc.encode_ordinary(prompt)] == re.findall(
            r" ?\w+|[?.]", prompt
        )


def test_other_tasks_allow_every_token():
    assert (
        data.allowed_tokens(TASK["dialogue"], SMALL) is None
        and data.allowed_tokens(TASK["summary"], SMALL) is None
    )


# ------------------------------------------------------------------------------------------------ single responses, thumbs


def loaded(tmp_path, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    news = []
    return data.load([path], say=news.append, **options), news


def test_single_responses_to_one_prompt_become_one_list(tmp_path):
    rows = [
        {"prompt": "The pond is", "response": " calm.", "reward": 2},
        {"prompt": "The sea is", "completion": " wide.", "score": 0.5},
        {"prompt": "The pond is", "response": " soup.", "rating": -1.5},
    ]
    records, news = loaded(tmp_path, *rows)
    assert records == [
        {"prompt": "The pond is", "responses": [" calm.", " soup."], "rewards": [2.0, -1.5]},
        {"prompt": "The sea is", "responses": [" wide."], "rewards": [0.5]},
    ]
    assert "single responses, 2 prompts, 3 responses; best of record 1: ' calm.'" in news[0]
    assert (
        loaded(tmp_path, *rows, limit=1)[0] == records[:1]
    )  # a limit counts lists, and each is whole


def test_thumbs_are_one_and_minus_one(tmp_path):
    labels = [True, False, 1, 0, 0.7, -3]
    records, _ = loaded(
        tmp_path, *({"prompt": f"{i}", "completion": "x", "label": x} for i, x in enumerate(labels))
    )
    assert [r["rewards"] for r in records] == [[1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0]]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "x", "completion": "y", "label": "yes"},
            "'label' is 'yes', expected true or false, or a number",
        ),
        ({"prompt": "x", "completion": "y", "label": None}, "'label' is None"),
        (
            '{"prompt": "x", "completion": "y", "label": NaN}',
            "'label' is nan, expected a finite number",
        ),
        ({"prompt": "x", "response": "y"}, "no field 'reward', expected"),
        (
            {"prompt": "x", "response": "y", "reward": "high"},
            "'reward' is 'high', expected a finite number",
        ),
        ({"prompt": "x", "response": ["y"], "reward": 1}, "'response' is list, expected a string"),
        ({"response": "y", "reward": 1}, "no field 'prompt'"),
    ],
)
def test_bad_single_responses_are_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(data.DataError, match=rf"rows.jsonl:2: {message}"):
        loaded(tmp_path, {"prompt": "a", "response": "b", "reward": 1}, row)
