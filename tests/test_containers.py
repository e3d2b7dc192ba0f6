"""Containers: .jsonl, .json, .csv, .parquet, .gz, standard input; what is none of them."""

import csv
import gzip
import io
import json
import os
import signal
import sys
import types

import pytest
from helpers import LISTS, load, write
from helpers import load_error as error

ROWS = [
    {"prompt": "Describe the pond.", "response": "Calm.", "reward": 4.5},
    {"prompt": "Describe the pond.", "response": 'Soup, "hot"\nand wet.', "reward": -1.0},
    {"prompt": "Décris la mer.", "response": "大海。", "reward": 3.0},
]
EXPECTED = [
    {
        "prompt": "Describe the pond.",
        "responses": ["Calm.", 'Soup, "hot"\nand wet.'],
        "rewards": [4.5, -1.0],
    },
    {"prompt": "Décris la mer.", "responses": ["大海。"], "rewards": [3.0]},
]


def as_table(rows, delimiter=",", **how):
    """The text of a .csv file."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, **how)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


CONTAINERS = {
    "lists.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "crlf.jsonl": "".join(json.dumps(row) + "\r\n" for row in ROWS),
    "no-end.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "array.jsonl": json.dumps(ROWS, indent=1),
    "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS),
    "objects.json": "".join(json.dumps(row, indent=1) for row in ROWS),
    "spread.jsonl": "".join(json.dumps(row, indent=1) + "\n" for row in ROWS),
    "around.json": json.dumps({"version": 1, "data": ROWS}),
    "table.csv": as_table(ROWS),
    "quoted.csv": as_table(ROWS, quoting=csv.QUOTE_ALL),
    "semicolons.csv": as_table(ROWS, ";"),
    "unix.csv": as_table(ROWS, lineterminator="\n"),
    "tabs.tsv": as_table(ROWS, "\t"),
    "NO-SUFFIX": "".join(json.dumps(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("how", ["plain", "mark", "gz", "gz of another name"])
def test_a_container_is_read(tmp_path, name, how):
    data = CONTAINERS[name].encode()
    data = b"\xef\xbb\xbf" + data if how == "mark" else data
    path = tmp_path / (name + ".gz" if how == "gz" else name)
    path.write_bytes(gzip.compress(data) if "gz" in how else data)
    records, news = load(path)
    assert records == EXPECTED and "single responses, 2 prompts, 3 responses" in news[-1]
    assert all(type(text) is str for r in records for text in (r["prompt"], *r["responses"]))


@pytest.mark.parametrize("name", ["lists.jsonl", "indented.json", "table.csv", "objects.json"])
@pytest.mark.parametrize("packed", [False, True])
def test_standard_input_is_read(monkeypatch, name, packed):
    data = CONTAINERS[name].encode()
    stream = io.BufferedReader(io.BytesIO(gzip.compress(data) if packed else data))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=stream))
    records, news = load("-")
    assert records == EXPECTED and news[-1].startswith("-: single responses")


def test_cells_of_a_table_hold_numbers_truth_values_and_lists(tmp_path):
    lists = [{"prompt": "Pond?", "responses": '["Calm.", "Soup."]', "rewards": "[1, -2.5]"}]
    expected = [{"prompt": "Pond?", "responses": ["Calm.", "Soup."], "rewards": [1.0, -2.5]}]
    assert load(write(tmp_path, as_table(lists), name="t.csv"))[0] == expected
    (tmp_path / "t.csv").write_text(" prompt, response ,reward\nPond?,Calm.,1\nPond?,Soup.,-2.5\n")
    assert load(tmp_path / "t.csv")[0] == expected
    thumbs = [{"prompt": x, "completion": "x", "label": x} for x in ("true", "False", "1", "0")]
    records, _ = load(write(tmp_path, as_table(thumbs), name="t.csv"))
    assert [r["rewards"] for r in records] == [[1.0], [-1.0], [1.0], [-1.0]]


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("prompt,response,reward\na,b\n", 2, "2 fields, and the header names 3"),
        ("prompt,response,reward\na,b,1\nc,d,high\n", 3, "'reward' is 'high', expected a finite"),
        ("prompt,response,reward\na,b,\n", 2, "'reward' is '', expected a finite number"),
        ("prompt,response,reward\na,b,1e400\n", 2, "'reward' is inf"),
        ("prompt,response,reward\na,b,nan\n", 2, "'reward' is nan"),
        ("prompt,completion,label\na,b,yes\n", 2, "the label is 'yes', expected true or false"),
        ("prompt,completion,label\na,b,2\n", 2, "the label is 2, expected true or false"),
        ("prompt,completion,label\na,b,nan\n", 2, "the label is nan, expected"),
        (
            "prompt,responses,rewards\na,Calm.,[1]\n",
            2,
            "'responses' is 'Calm.', expected a list as JSON",
        ),
        ('prompt,response,reward\n"a"b,c,1\n', 2, "not CSV"),
        ("prompt,prompt,reward\na,b,1\n", 1, "the header names 'prompt' twice"),
        ("prompt,response,reward\n", 1, "no record"),
        (
            "question,reply,stars\na,b,1\n",
            2,
            "fields question, reply, stars are of no known format",
        ),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, text, line, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    assert error(path).startswith(f"{path}:{line}: ") and message in error(path)


@pytest.mark.parametrize(
    "text, line, message",
    [
        (json.dumps(ROWS, indent=1).replace("},", "}"), 2, "no comma or ] after this object"),
        ('[{"prompt": "x",\n "response": "y"},\n{"prompt": ]', 1, "fields prompt, response are"),
        (json.dumps(ROWS)[:-1], 1, "the array does not end"),
        ("[" + json.dumps(ROWS[0]) + ",\n{,}]", 2, "not JSON"),
        ("[" + json.dumps(ROWS[0]) + ",\n\n3]", 3, "int instead of an object"),
        ("[" * 100_000, 1, "not JSON"),
        ("[]", 1, "no record"),
        ("", 1, "no record"),
        ('"text"', 1, "str instead of an object"),
        ('{"data": [1, 2]}', 1, "fields data are of no known format"),
    ],
)
def test_a_bad_array_is_named_with_its_line(tmp_path, text, line, message):
    path = tmp_path / "array.json"
    path.write_text(text)
    assert error(path).startswith(f"{path}:{line}: ") and message in error(path)


TEXT = CONTAINERS["lists.jsonl"]
GERMAN = {"prompt": "Wie schön ist der Bär?", "response": "Größer.", "reward": 1}
CHINESE = {"prompt": "这个池塘怎么样？", "response": "很平静。", "reward": 1}


def dumped(row, encoding):
    return json.dumps(row, ensure_ascii=False).encode(encoding)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "a zip or a spreadsheet: unpack it, or save it as .csv"),
        (b"BZh91AY", "bzip2: unpack it"),
        (b"\xfd7zXZ\x00", "xz: unpack it"),
        (b"\x28\xb5\x2f\xfd\x00", "zstd: unpack it"),
        (b"ARROW1\x00\x00", "an Arrow file: save it as .parquet or .jsonl"),
        (b"<!DOCTYPE html>", "a web page or XML: download the file itself"),
        (TEXT.encode("utf-16"), "UTF-16, not UTF-8: convert it, iconv -f UTF-16"),
        (TEXT.encode("utf-16-le"), "UTF-16, not UTF-8: convert it"),
        (TEXT.encode("utf-16-be"), "UTF-16, not UTF-8: convert it"),
        (dumped(GERMAN, "latin-1"), "it may be Latin-1; convert it, iconv -f Latin-1 -t UTF-8"),
        (dumped(CHINESE, "gbk"), "it may be GBK; convert it, iconv -f GBK -t UTF-8"),
        (b"PAR1" + bytes(50), "expected a readable parquet file"),
        (b"\x1f\x8b\x08" + bytes(9), "expected a readable file"),
        (b"\0\0\0\0", "1: "),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_is_no_text_in_utf_8_is_named_with_the_way_out(tmp_path, content, message):
    if content.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "lists.jsonl"
    path.write_bytes(content)
    assert error(path).startswith(f"{path}:1: ") and message in error(path)


def test_an_encoding_is_named_at_the_line_where_it_shows(tmp_path):
    path = write(tmp_path, ROWS[0], dumped(GERMAN, "latin-1"))
    assert error(path).startswith(f"{path}:2: byte 19 is not UTF-8")


def test_a_pipe_a_folder_and_a_name_of_a_hub_are_answered_and_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for the pipe"))
    signal.alarm(10)
    assert "1: a pipe or a device, expected a file; - is standard input" in error(tmp_path / "pipe")
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert f"1: a folder, expected files, as {tmp_path}/*.jsonl" in error(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("anthropic/hh-rlhf", "hf://datasets/x/y", "https://example.org/x.jsonl"):
        assert "a dataset of a hub is downloaded first" in error(name)
    assert "No such file" in error("data/lists.jsonl")
    assert ":1: embedded null byte, expected a readable file" in error("a\0b.jsonl")


def test_a_pattern_stands_for_all_that_it_matches_in_order(tmp_path):
    for name, part in (("b.jsonl", LISTS[2:4]), ("a.jsonl", LISTS[:2]), ("c.csv", [])):
        write(tmp_path, *part, name=name)
    assert load(f"{tmp_path}/*.jsonl")[0] == LISTS[:4]
    assert load(f"{tmp_path}/[ab].jsonl", f"{tmp_path}/b.jsonl")[0] == LISTS[:4] + LISTS[2:4]
    assert error(f"{tmp_path}/*.txt") == f"{tmp_path}/*.txt:1: no file matches this pattern"
    write(tmp_path, LISTS[7], name="[ab].jsonl")  # a file of that name goes first
    assert load(f"{tmp_path}/[ab].jsonl")[0] == LISTS[7:8]


# ------------------------------------------------------------------------------------------ parquet


def parquet_file(folder, rows, name="lists.parquet"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def test_parquet_is_read_and_its_rows_are_counted(tmp_path):
    assert load(parquet_file(tmp_path, ROWS))[0] == EXPECTED
    assert load(parquet_file(tmp_path, LISTS, "no-suffix"))[0] == LISTS
    pair = {"chosen": [{"role": "user", "content": "Pond?"}, {"role": "assistant", "content": "a"}]}
    pair["rejected"] = [pair["chosen"][0], {"role": "assistant", "content": "b"}]
    assert load(parquet_file(tmp_path, [pair]))[0][0]["responses"] == [" a", " b"]
    path = parquet_file(tmp_path, [*ROWS, {"prompt": "x", "response": "y", "reward": None}])
    assert error(path).startswith(f"{path}:4: no field 'reward'")


def test_a_broken_parquet_file_is_one_line(tmp_path):
    path = parquet_file(tmp_path, ROWS)
    whole = path.read_bytes()
    for data in (whole[:50], whole[:-20], b"PAR1" + whole[60:]):
        path.write_bytes(data)
        assert error(path).startswith(f"{path}:1: ") and "parquet" in error(path)


def test_without_pyarrow_a_parquet_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(50))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error(tmp_path / "x.parquet").endswith("which needs pyarrow: pip install pyarrow")


# -------------------------------------------------------------------------------------------- limit


@pytest.mark.parametrize("name", ["lists.jsonl", "array.json", "table.csv"])
def test_a_limit_reads_so_many_lists_and_not_the_file(tmp_path, name):
    rows = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(5)]
    text = {
        "lists.jsonl": "".join(json.dumps(row) + "\n" for row in rows) + "broken",
        "array.json": json.dumps(rows)[:-1] + ", broken]",
        "table.csv": as_table(rows) + '"broken',
    }[name]
    path = tmp_path / name
    path.write_text(text)
    assert len(load(path, limit=5)[0]) == 5
    assert [r["prompt"] for r in load(path, limit=3)[0]] == ["0?", "1?", "2?"]
    assert "broken" not in error(path, limit=6) and error(path, limit=6).startswith(str(path))


def test_a_limit_counts_usable_lists(tmp_path):
    rows = [LISTS[0], LISTS[1] | {"prompt": "Late?"}]
    bad = [LISTS[0] | {"responses": [], "rewards": []}]
    path = write(tmp_path, *rows[:1] * 30, *bad, *rows[1:], "broken")
    assert load(path, limit=31)[0][-1]["prompt"] == "Late?"


def test_what_belongs_to_a_list_is_read_whole_and_that_is_said(tmp_path):
    rows = [{"prompt": p, "response": f"{i}", "reward": i} for i, p in enumerate("abcab")]
    records, news = load(write(tmp_path, *rows), limit=2)
    assert [r["responses"] for r in records] == [["0", "3"], ["1", "4"]]
    assert any("read whole for --limit" in line for line in news)
    assert not any("read whole" in line for line in load(write(tmp_path, *rows))[1])
    message = {"parent_id": None, "role": "prompter", "text": "Pond?"}
    reply = {"role": "assistant", "text": "Calm."}
    rows = [message | {"message_id": k} for k in "ab"]
    rows += [
        reply | {"message_id": k + r, "parent_id": k, "rank": int(r)} for k in "ab" for r in "01"
    ]
    records, news = load(write(tmp_path, *rows), limit=1)
    assert len(records) == 1 and any("read whole for --limit" in line for line in news)
    assert not any("read whole" in x for x in load(write(tmp_path, *LISTS), limit=3)[1])


def test_a_tree_of_several_lists_is_cut_at_the_limit(tmp_path):
    replies = [{"text": t, "role": "assistant", "rank": i} for i, t in enumerate("ab")]
    asked = {"text": "And?", "role": "prompter", "replies": replies}
    first = {"text": "Yes.", "role": "assistant", "rank": 0, "replies": [asked]}
    tree = {"prompt": {"text": "Pond?", "role": "prompter", "replies": [first, replies[1]]}}
    path = write(tmp_path, tree, tree)
    assert [len(load(path, limit=n)[0]) for n in (1, 2, 3, 0)] == [1, 2, 3, 4]
