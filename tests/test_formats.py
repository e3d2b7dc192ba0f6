"""Files that people have: read as they are, or refused with file and line."""

import json
import math
import re
from pathlib import Path

import pytest
from helpers import DATA_DIR, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import files
import records as parts

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


def load(*paths, **options):
    """Records and the lines of news."""
    news = []
    return files.load(paths, say=news.append, **options), news


def error(*paths, **options):
    with pytest.raises(files.DataError) as e:
        load(*paths, **options)
    return str(e.value)


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
    assert message.endswith("File name too long, expected a readable .jsonl or .jsonl.gz file")


def test_a_long_value_is_shown_by_its_beginning_and_its_end():
    assert parts.short("a\nb") == "a b" and parts.short(80 * "a") == 80 * "a"
    cut = parts.short(41 * "a" + 41 * "b")
    assert cut == 40 * "a" + " ... " + 35 * "b" and len(cut) == 80


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


def test_thumbs_are_one_and_minus_one(tmp_path):
    labels = [True, False, 1, 0, 0.7, -3]
    rows = [{"prompt": f"{i}", "completion": "x", "label": up} for i, up in enumerate(labels)]
    records, _ = load(write(tmp_path, *rows))
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
    with pytest.raises(files.DataError, match=rf"lists.jsonl:2: {message}"):
        load(write(tmp_path, {"prompt": "a", "response": "b", "reward": 1}, row))
