"""Files that people have: read as they are, or refused with file and line."""

import json
import math
import re
from pathlib import Path

import pytest
from helpers import DATA_DIR, load, write
from helpers import load_error as error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import files
import formats
import records as parts
from formats import FORMATS

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


def changed(record=GOOD, **fields):
    """The record with these fields replaced, or left out where they are None."""
    record = {**record, **{k.replace("_", "-"): v for k, v in fields.items()}}
    return {k: v for k, v in record.items() if v is not None}


# ----------------------------------------------------------------------------- files that are right

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
        "canonical" in news
        and "2 lists of 1 prompts" in news
        and "6 responses" in news
        and "'Calm.'" in news
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
        changed(responses=["", " ", "\n"]),
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


# ----------------------------------------------------------------------------- files that are wrong

BROKEN = {
    "not JSON": ("Describe the pond.", "not JSON"),
    "half a record": (json.dumps(GOOD)[:40], "not JSON"),
    "two records on a line": (json.dumps(GOOD) * 2, "not JSON"),
    "not an object": ("[1, 2]", "list instead of an object"),
    "null": ("null", "NoneType instead of an object"),
    "no prompt": (changed(prompt=None), "no field 'prompt'"),
    "no responses": (changed(responses=None), "no field 'responses'"),
    "no rewards": (changed(rewards=None), "no field 'rewards'"),
    "prompt of another type": (
        changed(prompt=["Describe the pond."]),
        "a turn is str, expected an object",
    ),
    "responses of another type": (changed(responses="Calm."), "'responses' is str"),
    "a response of another type": (
        changed(responses=["Calm.", "Wet.", 3]),
        "response 3 is int, expected a string",
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
    "not objects": (changed(COPA, human_explanations=["Soup."]), "1 is str, expected an object"),
    "no rating": (changed(COPA, human_explanations=[{"text": "Soup."}]), "explanation 1 is None"),
    "no text": (changed(COPA, human_explanations=[{"filtered-avg-rating": 1}]), "no field 'text'"),
    "another format": (GOOD, "no field 'asks-for'"),
}


@pytest.mark.parametrize("case", broken_copa)
def test_a_broken_copa_line_is_named_with_its_file_and_number(tmp_path, case):
    line, what = broken_copa[case]
    path = write(tmp_path, COPA, line)
    assert error(path).startswith(f"{path}:2: ") and what in error(path)


LONG = "x" * 5_000_000
SINGLE = {"prompt": "Describe the pond.", "response": "Calm.", "reward": 1.0}
THUMB = {"prompt": "Describe the pond.", "completion": "Calm.", "label": True}


@pytest.mark.parametrize("record", [GOOD, COPA, SINGLE, THUMB], ids=["good", "copa", "1", "thumb"])
def test_a_message_is_short_whatever_stands_in_the_file(tmp_path, record):
    for name in record:
        for value in (LONG, [LONG], {LONG: LONG}, [[LONG]], LONG.encode().hex()[:4000]):
            path = write(tmp_path, record, {**record, name: value})
            try:
                load(path)
            except files.DataError as e:
                assert str(e).startswith(f"{path}:") and len(str(e)) <= 300 and "\n" not in str(e)
    path = write(tmp_path, LONG)
    assert error(path).startswith(f"{path}:1: not JSON") and len(error(path)) <= 300


def test_a_long_path_keeps_its_beginning_and_the_reason(tmp_path):
    message = error(f"{tmp_path}/{LONG}\n{LONG}")
    assert message.startswith(str(tmp_path)) and len(message) == 300 and "\n" not in message
    assert message.endswith("File name too long, expected a readable file")


def test_a_long_value_is_shown_by_its_beginning_and_its_end():
    assert parts.short("a\nb") == "a b" and parts.short(80 * "a") == 80 * "a"
    cut = parts.short(41 * "a" + 41 * "b")
    assert cut == 40 * "a" + " ... " + 35 * "b" and len(cut) == 80


def test_a_cause_is_cut_at_200_characters_and_a_path_to_what_is_left():
    assert str(parts.fault("a.jsonl", 7, "x" * 201)) == f"a.jsonl:7: {'x' * 100} ... {'x' * 95}"
    assert str(parts.fault("a.jsonl", 7, "x" * 200)) == f"a.jsonl:7: {'x' * 200}"
    message = str(parts.fault("/a/" + "b" * 400, 12, "x" * 201))
    assert message.startswith("/a/bbb") and ":12: xxx" in message and len(message) == 300


def test_a_file_without_records_or_that_cannot_be_read_is_named(tmp_path):
    assert error(write(tmp_path)).startswith(f"{tmp_path / 'lists.jsonl'}:1: no record")
    assert error(write(tmp_path, "", " ")).startswith(f"{tmp_path / 'lists.jsonl'}:1: no record")
    assert error(write(tmp_path, b"\xef\xbb\xbf")).startswith(
        f"{tmp_path / 'lists.jsonl'}:1: no record"
    )
    assert error(tmp_path / "absent.jsonl").startswith(
        f"{tmp_path / 'absent.jsonl'}:1: No such file"
    )
    assert error(tmp_path).startswith(f"{tmp_path}:1: a folder, expected files, as ")


def test_every_truncation_or_corruption_of_a_gz_file_ends_in_one_line(tmp_path):
    lists = [changed(prompt=f"{i}?") for i in range(7)]
    path = Path(write(tmp_path, *lists, name="lists.jsonl.gz"))
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert error(path).startswith(f"{path}:1: ")
    path.write_bytes(json.dumps(GOOD).encode())
    assert error(path).startswith(f"{path}:1: ")
    # A wrong byte anywhere after the header and the file name in it.
    for n in range(whole.index(b"\0", 10) + 1, len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :])
        assert re.match(rf"{re.escape(str(path))}:\d+: ", error(path))


json_value = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
no_object = json_value.filter(lambda value: not isinstance(value, dict))
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
LINE = json.dumps(GOOD).encode()
cut = st.builds(lambda length: LINE[:length], st.integers(1, len(LINE) - 1))


@quickly
@given(line=cut | no_object.map(json.dumps).map(str.encode))
def test_a_line_that_is_no_record_always_ends_the_load_at_its_number(tmp_path, line):
    path = write(tmp_path, GOOD, GOOD, line)
    assert error(path).startswith(f"{path}:3: ")


@settings(quickly, max_examples=200)
@given(lines=st.lists(mutated | st.binary(max_size=30) | cut, min_size=1, max_size=3))
def test_whatever_a_file_holds_it_is_read_or_refused_with_file_and_line(tmp_path, lines):
    path = write(tmp_path, *lines)
    try:
        records, _ = load(path)
    except files.DataError as e:
        assert re.fullmatch(rf"{re.escape(str(path))}:\d+: \S.*", str(e))
    else:
        for r in records:
            assert r["prompt"].strip() and r["responses"] and all(t.strip() for t in r["responses"])
            assert len(r["responses"]) == len(r["rewards"]) and all(
                map(math.isfinite, r["rewards"])
            )


# ----------------------------------------------------------------------------------------- COPA-SSE


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


# ------------------------------------------------------------------------- single responses, thumbs


def test_single_responses_to_one_prompt_become_one_list(tmp_path):
    rows = [
        {"prompt": "The pond is", "response": " calm.", "reward": 2},
        {"prompt": "The sea is", "completion": " wide.", "score": 0.5},
        {"prompt": "The pond is", "response": " soup.", "rating": -1.5},
    ]
    records, news = load(write(tmp_path, *rows))
    assert records == [
        {"prompt": "The pond is", "responses": [" calm.", " soup."], "rewards": [2.0, -1.5]},
        {"prompt": "The sea is", "responses": [" wide."], "rewards": [0.5]},
    ]
    assert "single responses, 2 prompts, 3 responses; best of record 1: ' calm.'" in news[0]
    # A limit counts lists, and each is whole.
    assert load(write(tmp_path, *rows), limit=1)[0] == records[:1]


@pytest.mark.parametrize("up, down", [(True, False), (1, 0), (1.0, 0.0)])
def test_thumbs_are_one_and_minus_one(tmp_path, up, down):
    rows = [{"prompt": f"{x}", "completion": "x", "label": x} for x in (up, down)]
    assert [r["rewards"] for r in load(write(tmp_path, *rows))[0]] == [[1.0], [-1.0]]


@pytest.mark.parametrize("label", [2, -1, 0.5, 4])
def test_other_labels_need_a_threshold(tmp_path, label):
    rows = [{"prompt": f"{x}", "completion": "x", "label": x} for x in (0, 1, label)]
    path = write(tmp_path, *rows)
    assert f"lists.jsonl:3: the label is {label}, expected true or false, 1 or 0; " in error(path)
    assert "--threshold X" in error(path)
    signs = [[1.0 if x > 0.75 else -1.0] for x in (0, 1, label)]
    assert [r["rewards"] for r in load(path, threshold=0.75)[0]] == signs


def test_a_threshold_is_exclusive_leaves_true_and_false_alone_and_goes_with_labels(tmp_path):
    rows = [{"prompt": f"{x}", "completion": "x", "label": x} for x in (0, 1, 2, True, False)]
    read = [r["rewards"][0] for r in load(write(tmp_path, *rows), threshold=1)[0]]
    assert read == [-1, -1, 1, 1, -1]
    assert "1: --threshold is for labels" in error(write(tmp_path, GOOD), threshold=1)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "x", "completion": "y", "label": "yes"},
            "the label is 'yes', expected true or false, or 1 or 0",
        ),
        ({"prompt": "x", "completion": "y", "label": None}, "the label is None"),
        (
            '{"prompt": "x", "completion": "y", "label": NaN}',
            "the label is nan, expected a finite number",
        ),
        (
            {"prompt": "x", "response": "y"},
            "no field 'reward' or 'score' or 'rating', expected prompt or query",
        ),
        (
            {"prompt": "x", "response": "y", "reward": "high"},
            "'reward' is 'high', expected a finite number",
        ),
        ({"prompt": "x", "response": ["y"], "reward": 1}, "a turn is str, expected an object"),
        ({"prompt": "x", "response": 3, "reward": 1}, "response 1 is int, expected a string"),
        ({"response": "y", "reward": 1}, "no field 'prompt'"),
    ],
)
def test_bad_single_responses_are_named_with_file_and_line(tmp_path, row, message):
    first = {"prompt": "a", "response": "b", "reward": 1}
    if "label" in row:
        first = {"prompt": "a", "response": "b", "label": True}
    with pytest.raises(files.DataError, match=rf"lists.jsonl:2: {message}"):
        load(write(tmp_path, first, row))


def test_a_file_of_scores_does_not_go_on_with_labels(tmp_path):
    message = error(write(tmp_path, SINGLE, THUMB))
    assert "lists.jsonl:2: no field 'reward'" in message
    assert "the file began with single responses, and this is one of thumbs" in message


# ------------------------------------------------------------------------- every format there is

HUMAN, ASKED = "\n\nHuman: Is the pond calm?", "\n\nHuman: Is the pond calm?\n\nAssistant:"
USER = {"role": "user", "content": "Is the pond calm?"}


def says(text, role="assistant"):
    return {"role": role, "content": text}


def record_of(prompt, responses, rewards):
    return {"prompt": prompt, "responses": responses, "rewards": rewards}


MARKS = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
POST = {"id": "t3_x", "post": "My frog left.", "title": "Frog gone", "subreddit": "pets"}
SHARE = {"conversations": [{"from": "human", "value": "Is the pond calm?"}]}
CASES = {  # format -> (rows of a file, Records)
    "copa-sse": (
        [COPA],
        [
            record_of(
                "The frog left. So what? The pond was calm.",
                ["Frogs make waves.", "Soup."],
                [4.25, 1.0],
            )
        ],
    ),
    "oasst-tree": (
        [
            {
                "prompt": {
                    "text": "Is the pond calm?",
                    "role": "prompter",
                    "replies": [
                        {"text": "Soup.", "role": "assistant", "rank": 1, "replies": []},
                        {
                            "text": "Yes.",
                            "role": "assistant",
                            "rank": 0,
                            "replies": [
                                {
                                    "text": "And wet?",
                                    "role": "prompter",
                                    "rank": None,
                                    "replies": [
                                        {"text": "No.", "role": "assistant", "rank": 1},
                                        {"text": "Yes.", "role": "assistant", "rank": 0},
                                        {"text": "Eh.", "role": "assistant", "rank": None},
                                    ],
                                }
                            ],
                        },
                    ],
                }
            }
        ],
        [
            record_of(ASKED, [" Soup.", " Yes."], [-1.0, 0.0]),
            record_of(
                f"{ASKED} Yes.\n\nHuman: And wet?\n\nAssistant:", [" No.", " Yes."], [-1.0, 0.0]
            ),
        ],
    ),
    "oasst": (
        [  # a reply before its parent, a reply without a rank, a tree of one reply
            {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Soup.", "rank": 1},
            {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Is the pond calm?"},
            {"message_id": "c", "parent_id": "a", "role": "assistant", "text": "Yes.", "rank": 0},
            {"message_id": "d", "parent_id": "a", "role": "assistant", "text": "Eh.", "rank": None},
            {"message_id": "e", "parent_id": None, "role": "prompter", "text": "Alone?"},
            {"message_id": "f", "parent_id": "e", "role": "assistant", "text": "Yes.", "rank": 0},
        ],
        [record_of(ASKED, [" Soup.", " Yes."], [-1.0, 0.0])],
    ),
    "pro": (
        [{"prefix": ["Pond?", "Pond?"], "suffix": ["Calm.", "Soup."], "reward": [1.7, -2.1]}],
        [record_of("Pond?", ["Calm.", "Soup."], [1.7, -2.1])],
    ),
    "tldr": (
        [
            {"info": POST, "summaries": [{"text": " Frog left."}, {"text": " Cars."}], "choice": 0},
            {
                "info": {"article": "A frog has left."},
                "summaries": [{"text": " Cars."}, {"text": " Frog."}],
                "choice": 1,
            },
        ],
        [
            record_of(
                "SUBREDDIT: r/pets\n\nTITLE: Frog gone\n\nPOST: My frog left.\n\nTL;DR:",
                [" Frog left.", " Cars."],
                [1.0, 0.0],
            ),
            record_of("A frog has left.\n\nTL;DR:", [" Cars.", " Frog."], [0.0, 1.0]),
        ],
    ),
    "tldr-axis": (
        [
            {"info": {"post": "Frog."}, "summary": {"text": " Left.", "axes": {"overall": 6}}},
            {"info": {"post": "Frog."}, "summary": {"text": " Cars.", "axes": {"overall": 1}}},
            {"info": {"post": "Frog."}, "summary": {"text": " Soup.", "axes": {"accuracy": 7}}},
        ],
        [record_of("POST: Frog.\n\nTL;DR:", [" Left.", " Cars."], [6.0, 1.0])],
    ),
    "webgpt": (
        [
            {
                "question": {"full_text": "Is the pond calm?", "id": "x"},
                "answer_0": "Soup.",
                "answer_1": "Yes.",
                "score_0": -0.5,
                "score_1": 0.5,
            },
            {"question": "Tie?", "answer_0": "Yes.", "answer_1": "No.", "score_0": 0, "score_1": 0},
        ],
        [
            record_of("Is the pond calm?", ["Soup.", "Yes."], [-0.5, 0.5]),
            record_of("Tie?", ["Yes.", "No."], [0.0, 0.0]),
        ],
    ),
    "shp": (
        [
            {"history": "Pond?", "human_ref_A": "Soup.", "human_ref_B": "Calm.", "labels": 0},
            {
                "history": "Sea?",
                "human_ref_A": "Wide.",
                "human_ref_B": "Soup.",
                "labels": 1,
                "score_A": 12,
                "score_B": 3,
            },
        ],
        [
            record_of("Pond?", ["Calm.", "Soup."], [1.0, 0.0]),
            record_of("Sea?", ["Wide.", "Soup."], [12.0, 3.0]),
        ],
    ),
    "arena": (
        [
            {
                "conversation_a": [USER, says("Soup.")],
                "conversation_b": [USER, says("Yes.")],
                "winner": "model_b",
            },
            {"conversation_a": [], "conversation_b": [], "winner": "tie (bothbad)"},
        ],
        [record_of(ASKED, [" Yes.", " Soup."], [1.0, 0.0])],
    ),
    "helpsteer3": (
        [
            {"context": [USER], "response1": "Yes.", "response2": "Eh.", "overall_preference": -2},
            {"context": [USER], "response1": "Eh.", "response2": "Yes.", "overall_preference": 1},
            {"context": [USER], "response1": "Eh.", "response2": "Oh.", "overall_preference": 0},
        ],
        [
            record_of(ASKED, [" Yes.", " Eh."], [2.0, 0.0]),
            record_of(ASKED, [" Eh.", " Yes."], [-1.0, 0.0]),
        ],
    ),
    "helpsteer": (
        [
            {"prompt": "Pond?", "response": "Calm.", "helpfulness": 3, **MARKS},
            {"prompt": "Pond?", "response": "Soup.", "helpfulness": 0, **MARKS},
        ],
        [record_of("Pond?", ["Calm.", "Soup."], [3.0, 0.0])],
    ),
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: Pond?\n\nAssistant: ",
                "answers": [{"answer": "Soup.", "rank": 2.0}, {"answer": "Calm.", "rank": 1.0}],
            }
        ],
        [record_of("\n\nHuman: Pond?\n\nAssistant: ", ["Soup.", "Calm."], [-2.0, -1.0])],
    ),
    "ultrafeedback": (
        [
            {
                "instruction": "Pond?",
                "completions": [
                    {"response": "Calm.", "fine-grained_score": 4.5, "overall_score": 8.0},
                    {
                        "response": "Soup.",
                        "annotations": {
                            "helpfulness": {"Rating": "2"},
                            "honesty": {"Rating": "N/A"},
                            "truthfulness": {"Rating": "1"},
                        },
                        "overall_score": 10.0,
                    },
                    {"response": "Eh.", "annotations": {"honesty": {"Rating": "N/A"}}},
                ],
            },
            {"instruction": "Sea?", "completions": [{"response": "Wide.", "overall_score": 10.0}]},
        ],
        [record_of("Pond?", ["Calm.", "Soup."], [4.5, 1.5])],
    ),
    "nested": (
        [
            {
                "prompt": "Pond?",
                "responses": [{"text": "Calm.", "reward": 2}, {"response": "Soup.", "score": -1}],
            }
        ],
        [record_of("Pond?", ["Calm.", "Soup."], [2.0, -1.0])],
    ),
    "canonical": (
        [
            {"query": "Pond?", "responses": ["Calm.", "Soup."], "scores": [1.5, -2]},
            {"instruction": "Sea?", "responses": ["Wide."], "rewards": [1]},
            {
                "prompt": [USER],
                "responses": ["Yes.", [says("Soup.")]],
                "rewards": [1, 0.5],
                "ranks": 3,
            },
        ],
        [
            record_of("Pond?", ["Calm.", "Soup."], [1.5, -2.0]),
            record_of("Sea?", ["Wide."], [1.0]),
            record_of(ASKED, [" Yes.", " Soup."], [1.0, 0.5]),
        ],
    ),
    "ranks": (
        [{"prompt": "Pond?", "responses": ["Soup.", "Calm."], "ranks": [2, 1]}],
        [record_of("Pond?", ["Soup.", "Calm."], [-2.0, -1.0])],
    ),
    "sharegpt": (
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    *SHARE["conversations"],
                ],
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "Soup."},
            },
            {"messages": [USER], "chosen": says("Yes."), "rejected": says("Soup.")},
        ],
        [
            record_of("\n\nSystem: Be brief." + ASKED, [" Yes.", " Soup."], [1.0, 0.0]),
            record_of(ASKED, [" Yes.", " Soup."], [1.0, 0.0]),
        ],
    ),
    "sharegpt-kto": (
        [
            {
                "conversations": [*SHARE["conversations"], {"from": "gpt", "value": "Yes."}],
                "kto_tag": True,
            },
            {"messages": [USER, says("Soup.")], "kto_tag": False},
            {"messages": [USER], "kto_tag": False},
            {"messages": [USER, says("Eh.")], "label": False},
        ],
        [record_of(ASKED, [" Yes.", " Soup.", " Eh."], [1.0, -1.0, -1.0])],
    ),
    "hh": (
        [
            {"chosen": ASKED + " Yes, very.", "rejected": ASKED + " Soup."},
            {"chosen": ASKED + " Yes.", "rejected": "\n\nHuman: Is it?\n\nAssistant: No."},
            {"chosen": "Yes.", "rejected": ASKED + " No."},
            {"chosen": ASKED + " Yes.", "rejected": ASKED},
            {
                "chosen": f"{ASKED} Yes.\n\nHuman: And wet?\n\nAssistant: Very.",
                "rejected": f"{ASKED} Yes.\n\nHuman: And wet?\n\nAssistant: Eh.",
            },
        ],
        [
            record_of(ASKED, [" Yes, very.", " Soup."], [1.0, 0.0]),
            record_of(ASKED, [" Yes."], [1.0]),
            record_of(
                f"{ASKED} Yes.\n\nHuman: And wet?\n\nAssistant:", [" Very.", " Eh."], [1.0, 0.0]
            ),
        ],
    ),
    "alpaca": (
        [
            {"instruction": "Describe:", "input": "a pond", "chosen": "Calm.", "rejected": "Soup."},
            {
                "instruction": "Describe a pond.",
                "input": "",
                "chosen": "Calm.",
                "rejected": "Soup.",
            },
            {
                "instruction": "And wet?",
                "system": "Be brief.",
                "history": [["Is the pond calm?", "Yes."]],
                "chosen": "Yes.",
                "rejected": "No.",
            },
        ],
        [
            record_of("Describe:\na pond", ["Calm.", "Soup."], [1.0, 0.0]),
            record_of("Describe a pond.", ["Calm.", "Soup."], [1.0, 0.0]),
            record_of(
                f"\n\nSystem: Be brief.{ASKED} Yes.\n\nHuman: And wet?\n\nAssistant:",
                [" Yes.", " No."],
                [1.0, 0.0],
            ),
        ],
    ),
    "alpaca-kto": (
        [
            {"instruction": "Describe:", "input": "a pond", "output": "Calm.", "kto_tag": True},
            {"instruction": "Describe:", "input": "a pond", "output": "Soup.", "kto_tag": False},
        ],
        [record_of("Describe:\na pond", ["Calm.", "Soup."], [1.0, -1.0])],
    ),
    "ultrafeedback-binarized": (
        [
            {
                "prompt": "Is the pond calm?",
                "chosen": [USER, says("Yes.")],
                "rejected": [USER, says("Soup.")],
                "messages": [USER, says("Yes.")],
                "score_chosen": 8.5,
                "score_rejected": 3,
            },
            {
                "prompt": "Sea?",
                "chosen": "Wide.",
                "rejected": "Soup.",
                "score_chosen": 4.0,
                "score_rejected": 4,
            },
            {
                "prompt": "Sea?",
                "chosen": "Wide.",
                "rejected": "Eh.",
                "score_chosen": None,
                "score_rejected": 4,
            },
        ],
        [
            record_of(ASKED, [" Yes.", " Soup."], [8.5, 3.0]),
            record_of("Sea?", ["Wide.", "Soup."], [1.0, 0.0]),
            record_of("Sea?", ["Wide.", "Eh."], [1.0, 0.0]),
        ],
    ),
    "preference": (
        [
            {"prompt": "The pond is", "chosen": " calm.", "rejected": " made of soup."},
            {"prompt": [USER], "chosen": [says("Yes.")], "rejected": [says("Soup.")]},
            {"chosen": [USER, says("Yes.")], "rejected": [USER, says("Soup.")]},
            {"question": "Is it?", "system": "Be brief.", "chosen": "Yes.", "rejected": "Soup."},
        ],
        [
            record_of("The pond is", [" calm.", " made of soup."], [1.0, 0.0]),
            record_of(ASKED, [" Yes.", " Soup."], [1.0, 0.0]),
            record_of(ASKED, [" Yes.", " Soup."], [1.0, 0.0]),
            record_of(
                "\n\nSystem: Be brief.\n\nHuman: Is it?\n\nAssistant:",
                [" Yes.", " Soup."],
                [1.0, 0.0],
            ),
        ],
    ),
    "scored": (
        [
            {"instruction": "Describe:", "input": "a pond", "output": "Calm.", "score": 4},
            {"instruction": "Describe:", "input": "a pond", "response": "Soup.", "rating": 1.5},
            {"input": "Describe a sea.", "output": "Wide.", "score": 3},
        ],
        [
            record_of("Describe:\na pond", ["Calm.", "Soup."], [4.0, 1.5]),
            record_of("Describe a sea.", ["Wide."], [3.0]),
        ],
    ),
    "single": (
        [SINGLE, SINGLE | {"response": "Soup.", "reward": 0}],
        [record_of("Describe the pond.", ["Calm.", "Soup."], [1.0, 0.0])],
    ),
    "unpaired": (
        [THUMB, {"prompt": [USER], "completion": [says("Soup.")], "label": False}],
        [record_of("Describe the pond.", ["Calm."], [1.0]), record_of(ASKED, [" Soup."], [-1.0])],
    ),
}


def test_every_format_has_a_case():
    assert list(CASES) == list(FORMATS)


@pytest.mark.parametrize("name", CASES)
def test_a_format_is_recognised_and_read(tmp_path, name):
    rows, expected = CASES[name]
    assert files.recognise(rows[0]) == name
    records, news = load(write(tmp_path, *rows))
    assert records == expected
    assert FORMATS[name].title in news[-1] and "record 1: " in news[-1]
    # The same where it is asked for by name.
    assert load(write(tmp_path, *rows), format=name)[0] == expected


# Fields that tell a format from others, and which a later row may lack.
MAY_LACK = {
    "alpaca": ["instruction"],
    "alpaca-kto": ["instruction|input"],
    "scored": ["instruction|input"],
    "ultrafeedback-binarized": ["prompt", "score_chosen", "score_rejected"],
    "oasst": ["parent_id"],
}


@pytest.mark.parametrize("name", CASES)
def test_every_field_of_a_format_is_needed(tmp_path, name):
    first = CASES[name][0][0]
    for names in FORMATS[name].fields.split():
        row = {k: v for k, v in first.items() if k not in names.split("|")}
        assert not FORMATS[name].fits(row)
        path = write(tmp_path, first, row)
        if names not in MAY_LACK.get(name, []):
            assert error(path).startswith(f"{path}:2: no field '{names.split('|')[0]}'")


@pytest.mark.parametrize(
    "name, said",
    [
        ("hh", "left out 1 times: the responses differ before the last turn"),
        ("hh", "left out 1 times: a transcript without a turn of the assistant"),
        ("hh", "left out 1 times: an empty response"),
        ("arena", "left out 1 times: a tie"),
        ("helpsteer3", "left out 1 times: a tie"),
        ("tldr-axis", "left out 1 times: no rating of overall"),
        ("ultrafeedback", "left out 1 times: no completion has a rating"),
        ("sharegpt-kto", "left out 1 times: the last turn is not the assistant's"),
        ("shp", "1 of 2 records have scores and a label: the scores count"),
        ("ultrafeedback-binarized", "1 of 3 records have scores and a label: the scores count"),
        ("ultrafeedback-binarized", "1 of 3 records have equal scores: the chosen earns 1"),
        ("ultrafeedback-binarized", "1 of 3 records lack a score: the chosen earns 1, the rej"),
        ("helpsteer3", "2 lists of 1 prompts, 4 responses; best of record 1: ' Yes.'"),
        ("unpaired", "2 prompts, 2 responses; record 1: 'Calm.' earns 1"),
    ],
)
def test_what_is_left_out_or_settled_is_said(tmp_path, name, said):
    _, news = load(write(tmp_path, *CASES[name][0]))
    assert any(said in line for line in news), news


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("tldr", {"choice": 2}, "'choice' is 2, expected 0 or 1"),
        ("tldr", {"summaries": [{"text": "x"}]}, "'choice' is 0, expected 0 or 1 of two summaries"),
        ("shp", {"labels": 2}, "'labels' is 2, expected 1"),
        ("arena", {"winner": "model_c"}, "'winner' is 'model_c', expected model_a"),
        ("pro", {"prefix": ["Pond?", "Sea?"]}, "'prefix' holds different prompts"),
        ("pro", {"suffix": ["Calm."]}, "1 responses and 2 rewards"),
        (
            "alpaca",
            {"history": [["Is it?"]]},
            "'history' holds something else than [question, reply]",
        ),
        ("ranks", {"ranks": [1, None]}, "rank 2 is None, expected a finite number"),
        (
            "ultrafeedback",
            {"completions": [{"response": "x", "fine-grained_score": "4"}]},
            "is '4'",
        ),
        ("oasst", {"rank": "best"}, "'rank' is 'best', expected a finite number"),
    ],
)
def test_a_wrong_field_of_a_format_is_named(tmp_path, name, row, message):
    first = CASES[name][0][0]
    path = write(tmp_path, first, first | row)
    assert error(path).startswith(f"{path}:2: ") and message in error(path)


def test_the_rewards_of_another_field_are_asked_for(tmp_path):
    rows = CASES["helpsteer"][0]
    records, _ = load(write(tmp_path, *rows), format="helpsteer:verbosity")
    assert records == [record_of("Pond?", ["Calm.", "Soup."], [2.0, 2.0])]
    records, _ = load(write(tmp_path, *CASES["tldr-axis"][0]), format="tldr-axis:accuracy")
    assert records[0]["responses"] == [" Soup."] and records[0]["rewards"] == [7.0]
    records, _ = load(
        write(tmp_path, *CASES["ultrafeedback"][0]), format="ultrafeedback:helpfulness"
    )
    assert records == [record_of("Pond?", ["Soup."], [2.0])]
    own = [SINGLE | {"votes": 5, "reward": 1}]
    assert load(write(tmp_path, *own), format="single:votes")[0][0]["rewards"] == [5.0]
    assert error(write(tmp_path, SINGLE), format="single:votes").endswith("no field 'votes'")


@pytest.mark.parametrize(
    "format, message",
    [
        ("chess", "format chess: no format of this name, nearest are "),
        ("SINGLE", "nearest are single, "),
        ("pro:votes", "a field of the rewards can be told for tldr-axis, helpsteer"),
        ("single:", "a field of the rewards can be told for"),
    ],
)
def test_an_impossible_format_is_refused(tmp_path, format, message):
    assert message in error(write(tmp_path, GOOD), format=format)


def test_a_format_that_is_asked_for_is_not_guessed(tmp_path):
    both = [SINGLE | {"label": True}, SINGLE | {"response": "Soup.", "label": False, "reward": 2}]
    assert load(write(tmp_path, *both))[0][0]["rewards"] == [1.0, 2.0]
    assert load(write(tmp_path, *both), format="unpaired")[0][0]["rewards"] == [1.0, -1.0]
    message = error(write(tmp_path, GOOD), format="pro")
    said = "no field 'prefix': --format says PRO lists, and this is one of canonical lists"
    assert message.endswith(f"lists.jsonl:1: {said}")


def test_an_unknown_format_names_its_fields_the_nearest_format_and_ours(tmp_path):
    message = error(write(tmp_path, {"promt": "x", "chosen": "y", "rejectd": "z"}))
    assert "fields promt, chosen, rejectd are of no known format; nearest is preference" in message
    assert message.endswith(f"ours is {formats.CANONICAL}")
    many = {f"{k} {'x' * 50}": 1 for k in range(1000)}
    path = write(tmp_path, many)
    assert len(error(path)) <= len(path) + 4 + 200


@pytest.mark.parametrize(
    "fields, nearest",
    [
        ("prompt response", "unpaired"),  # a label is missing, or a score
        ("prompt chosen", "preference"),
        ("Prompt Chosen Rejected", "preference"),
        ("instruction completion id", "unpaired"),
        ("instruction completionss", "ultrafeedback"),
        ("input output", "scored"),
        ("prompt responses", "nested"),
        ("messages", "sharegpt-kto"),
        ("conversation_a conversation_b winer", "arena"),
        ("stars", "canonical"),
        ("", "canonical"),
    ],
)
def test_the_nearest_format_is_that_of_the_most_fields(tmp_path, fields, nearest):
    message = error(write(tmp_path, dict.fromkeys(fields.split(), "x")))
    assert f"are of no known format; nearest is {nearest}; ours is" in message


def test_scores_count_before_a_label_where_they_differ(tmp_path):
    rows = [SINGLE | {"label": up, "reward": r} for up, r in ((True, 3), (False, 4))]
    records, news = load(write(tmp_path, *rows))
    assert records[0]["rewards"] == [3.0, 4.0]
    assert any("2 of 2 records have scores and a label: the scores count" in line for line in news)
    rows = [SINGLE | {"label": up, "reward": 3} for up in (True, False)]
    records, news = load(write(tmp_path, *rows))
    assert records[0]["rewards"] == [1.0, -1.0]
    assert any("2 of 2 records have a label, and scores that are all equal" in x for x in news)
    rows = [SINGLE | {"label": 5}]
    assert "lists.jsonl:1: the label is 5, expected" in error(write(tmp_path, *rows))
    assert load(write(tmp_path, *rows), threshold=3)[0][0]["rewards"] == [1.0]


@pytest.mark.parametrize(
    "row, becomes",
    [
        ({"responses": ["Calm."], "scores": [1]}, ("canonical", [1.0])),
        ({"responses": ["Calm."], "ranks": [1]}, ("ranks", [-1.0])),
        ({"responses": [{"text": "Calm.", "score": 2}]}, ("nested", [2.0])),
        ({"completion": "Calm.", "score": 2}, ("single", [2.0])),
        ({"output": "Calm.", "label": True}, ("unpaired", [1.0])),
        ({"output": "Calm.", "label": False, "history": []}, ("unpaired", [-1.0])),
    ],
)
def test_the_input_of_an_instruction_is_part_of_every_prompt(tmp_path, row, becomes):
    name, rewards = becomes
    row = {"instruction": "Describe:", "input": "a pond"} | row
    assert files.recognise(row) == name
    asked = [record_of("Describe:\na pond", ["Calm."], rewards)]
    assert load(write(tmp_path, row))[0] == asked
    # An input beside a prompt, or an empty one, is none of it.
    alone = [record_of("Describe:", ["Calm."], rewards)]
    assert load(write(tmp_path, row | {"input": ""}))[0] == alone
    del row["instruction"]
    assert load(write(tmp_path, row | {"prompt": "Describe:"}), format=name)[0] == alone


def test_a_field_that_is_missing_in_a_turn_is_named_alone(tmp_path):
    row = {"prompt": "Pond?", "chosen": [{"role": "assistant"}], "rejected": [says("Soup.")]}
    assert error(write(tmp_path, row)).endswith(":1: no field 'content' or 'value' or 'text'")


def test_a_reply_may_be_a_string_beside_one_that_is_a_conversation(tmp_path):
    row = {"prompt": "Is the pond calm?", "chosen": [says("Yes.")], "rejected": "Soup."}
    assert load(write(tmp_path, row))[0] == [record_of(ASKED, [" Yes.", " Soup."], [1.0, 0.0])]
