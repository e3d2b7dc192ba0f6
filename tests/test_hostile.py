"""Whatever a file holds, it is read, or refused in one line with its place: never a traceback.

LIRE_EXAMPLES=100000 pytest tests/test_hostile.py is the long way.
"""

import copy
import csv
import gzip
import io
import json
import math
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import CASES

import files

EXAMPLES = int(os.environ.get("LIRE_EXAMPLES", 300))
hostile = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def check(path, data, **options):
    """Read a file of these bytes. Returns: Records, or the refusal."""
    path.write_bytes(data)
    try:
        records = files.load([path], say=lambda line: None, **options)
    except files.DataError as e:
        assert re.fullmatch(rf"{re.escape(str(path))}:\d+: \S.{{0,199}}", str(e)), str(e)
        return str(e)
    assert records
    for r in records:
        assert list(r) == ["prompt", "responses", "rewards"]
        texts = [r["prompt"], *r["responses"]]
        assert all(type(text) is str and text.strip() for text in texts)
        assert len(r["responses"]) == len(r["rewards"]) > 0
        assert all(type(x) is float and abs(x) <= 1e30 for x in r["rewards"])
        "".join(texts).encode()  # without lone surrogates
    return records


# --------------------------------------------------------------------------- rows changed somewhere

words = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\0",
        "\ud800",
        "x" * 999,
        "\n\nAssistant:",
        "tie",
        "assistant",
        "N/A",
        "1",
        "é",
    ]
) | st.text(max_size=5)
numbers = st.sampled_from(
    [0, 1, -1, 2, 0.5, 1e29, 1e31, 1e308, 10**400, math.nan, math.inf, -math.inf, -0.0]
)
odd = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(words, inner, max_size=3)
        | st.fixed_dictionaries({"role": words, "content": inner})
    ),
    max_leaves=6,
)
ROWS = [(name, row) for name, (rows, _) in CASES.items() for row in rows]
RAW = {
    "RAW1": "1e400",
    "RAW2": "7" * 5000,
    "RAW3": "[" * 100_000,
    "RAW4": "-Infinity",
    "RAW5": "{,",
}


@st.composite
def changed(draw, row):
    """The row with a part of it replaced, deleted or said twice."""
    row = copy.deepcopy(row)
    part = row
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            return row
        key = draw(st.sampled_from(keys))
        if not isinstance(part[key], (dict, list)) or draw(st.booleans()):
            break
        part = part[key]
    how = draw(st.sampled_from(["odd", "odd", "raw", "delete", "other", "none"]))
    if how == "odd":
        part[key] = draw(odd)
    elif how == "raw":
        part[key] = draw(st.sampled_from(list(RAW)))
    elif how == "delete":
        del part[key]
    elif how == "other" and isinstance(part, dict):
        part[draw(st.sampled_from(["prompt", "label", "reward", "responses", "text"]))] = part[key]
    return row


@st.composite
def tables(draw):
    """Rows, most of one format, some of them changed."""
    name = draw(st.sampled_from(list(CASES)))
    own = CASES[name][0]
    rows = draw(st.lists(st.sampled_from(own), min_size=1, max_size=3))
    rows = [draw(changed(row)) if draw(st.booleans()) else row for row in rows]
    if draw(st.integers(0, 5)) == 0:
        rows.append(draw(st.sampled_from(ROWS))[1])
    return name, rows


def dumped(rows, container):
    """The bytes of a file of these rows."""
    if container == "csv":
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)))
        table.writeheader()
        as_cell = lambda value: value if isinstance(value, str) else json.dumps(value)
        table.writerows({k: as_cell(v) for k, v in row.items()} for row in rows)
        text = text.getvalue()
    elif container == "json":
        text = json.dumps(rows, indent=1)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    for name, value in RAW.items():
        text = text.replace(f'"{name}"', value)
    return text.encode("utf-8", "surrogatepass")


@hostile
@given(
    table=tables(),
    container=st.sampled_from(["jsonl", "json", "csv"]),
    asked=st.booleans(),
    threshold=st.sampled_from([None, None, 0.5]),
)
def test_rows_of_every_format_changed_somewhere(
    tmp_path_factory, table, container, asked, threshold
):
    name, rows = table
    path = tmp_path_factory.getbasetemp() / f"changed.{container}"
    check(path, dumped(rows, container), format=name if asked else "", threshold=threshold)


@hostile
@given(
    table=tables(),
    container=st.sampled_from(["jsonl", "json", "csv"]),
    edits=st.lists(
        st.tuples(
            st.floats(0, 0.999),
            st.sampled_from(["cut", "flip", "insert", "delete"]),
            st.binary(min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    ),
    packed=st.booleans(),
)
def test_files_of_every_format_with_wrong_bytes(tmp_path_factory, table, container, edits, packed):
    data = dumped(table[1], container)
    data = gzip.compress(data, mtime=0) if packed and len(data) < 10_000 else data
    for where, how, some in edits:
        at = int(where * len(data))
        if how == "cut":
            data = data[:at]
        elif how == "flip":
            data = data[:at] + bytes([data[at] ^ some[0]]) + data[at + 1 :] if data else data
        else:
            data = data[:at] + (some if how == "insert" else b"") + data[at + (how == "delete") :]
    check(tmp_path_factory.getbasetemp() / f"bytes.{container}", data)


@hostile
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from(
        [b"", b"{", b"[", b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf", b"a,b\n", b"[{"]
    ),
    ending=st.sampled_from(["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet", "txt"]),
)
def test_any_bytes_under_any_name(tmp_path_factory, data, start, ending):
    check(tmp_path_factory.getbasetemp() / f"any.{ending}", start + data)


# -------------------------------------------------------------------------------- one by one, large

LINE = json.dumps({"prompt": "Pond?", "responses": ["Calm.", "Soup."], "rewards": [1, 0.5]})
LARGE = "x" * 10_000_000
PAIR = '{"prompt": "Pond?", "chosen": %s, "rejected": "Soup."}'


@pytest.mark.parametrize("container", ["jsonl", "json", "csv"])
@pytest.mark.parametrize(
    "text, refused",
    [
        (LINE.replace("Calm.", LARGE), False),
        (LINE.replace("prompt", LARGE), True),
        (LARGE, True),
        ("[" * 100_000, True),
        ('{"prompt": ' * 100_000, True),
        (LINE.replace("0.5", "NaN"), True),
        (LINE.replace("0.5", "-Infinity"), True),
        (LINE.replace("0.5", "1e400"), True),
        (LINE.replace("0.5", "7" * 5000), True),
        (LINE.replace("0.5", "7" * 4000), True),
        (LINE.replace("Calm.", "\\ud800"), False),
        (LINE.replace("Calm.", "\\u0000"), False),
        (LINE.replace("Calm.", "\0"), True),
        (LINE.replace('"rewards"', '"rewards": [3, 4], "rewards"'), False),  # the last one counts
        (PAIR % ("[" * 100_000), True),
        (PAIR % '{"role": "assistant"}', True),
        ("\ufeff" + LINE, False),
        ("", True),
        ("\n\n\n", True),
    ],
    ids=lambda x: str(x)[:12],
)
def test_large_and_strange_lines(tmp_path, container, text, refused):
    result = check(tmp_path / f"lists.{container}", text.encode())
    assert isinstance(result, str) == (refused or container == "csv")


def test_deep_trees_and_circles_of_messages_end(tmp_path):
    depth = 150
    tree = {"text": "x", "role": "prompter", "replies": []}
    for k in range(depth):
        pair = [{"text": f"{k} {j}", "role": "assistant", "rank": j, "replies": []} for j in (0, 1)]
        pair[0]["replies"] = [tree]
        tree = {"text": f"{k}?", "role": "prompter", "replies": pair}
    records = check(tmp_path / "tree.jsonl", json.dumps({"prompt": tree}).encode())
    assert len(records) == depth
    rows = [
        {"message_id": k, "parent_id": p, "role": role, "text": f"{k}", "rank": 0}
        for k, p, role in [("a", "b", "prompter"), ("b", "a", "assistant"), ("c", "a", "assistant")]
    ]
    records = check(tmp_path / "circle.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert len(records) == 1
