"""What `load` says and settles: counted lists, empty responses, rewards that stand alone."""

import gc
import json
import re
import sys

import pytest
from helpers import LISTS, load, write

import files


def rated(*rewards):
    return [{"prompt": f"{i}?", "response": "Calm.", "reward": x} for i, x in enumerate(rewards)]


# ------------------------------------------------------------------------- rewards that stand alone


@pytest.mark.parametrize(
    "rewards, line, said",
    [
        ([0.5, -0.25, 0.1, -999.0, 0.3], 4, "reward -999 (1 of them) is "),
        ([0.5, 999, 0.1, 0.2, 999], 2, "reward 999 (2 of them) is "),
        ([-1.0, 0.0, 1.0, 17.0], 4, "reward 17 (1 of them) is 21 deviations away from the others"),
    ],
)
def test_a_reward_that_stands_alone_is_named_with_its_line(tmp_path, rewards, line, said):
    path = write(tmp_path, *rated(*rewards))
    _, news = load(path)
    (warning,) = [text for text in news if "deviations" in text]
    assert warning.startswith(f"{path}:{line}: {said}") and "take it out" in warning


@pytest.mark.parametrize(
    "rewards",
    [
        [-1.0, 0.0, 1.0, 16.0],  # 19.6 deviations of sqrt(2/3)
        [0.0, 1.0, 0.0, 1.0, 999.0],  # the others have two values
        [0.0, 0.0, 999.0],
        [5.0],
        [1.0, 1.0],
        [float(x * x) for x in range(30)],
    ],
)
def test_other_rewards_are_no_news(tmp_path, rewards):
    assert not [line for line in load(write(tmp_path, *rated(*rewards)))[1] if "deviation" in line]


def test_a_stand_in_inside_a_list_is_found_at_both_ends(tmp_path):
    lists = [
        row | {"rewards": [float(i % 5), 1.0, 0.5][: len(row["rewards"])]}
        for i, row in enumerate(LISTS)
    ]
    lists[7] = lists[7] | {"rewards": [1.0, -1e6, 2.0]}
    lists[9] = lists[9] | {"rewards": [1e9, 0.0, 2.0]}
    path = write(tmp_path, *lists)
    warnings = [line for line in load(path)[1] if "deviations" in line]
    assert len(warnings) == 1 and warnings[0].startswith(f"{path}:10: reward 1e+09")
    lists[9] = LISTS[9]
    warnings = [line for line in load(write(tmp_path, *lists))[1] if "deviations" in line]
    assert len(warnings) == 1 and warnings[0].startswith(f"{path}:8: reward -1e+06")


# --------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_response_is_left_out_and_not_its_list(tmp_path, empty):
    lists = [row | {"responses": [empty, *row["responses"][1:]]} for row in LISTS]
    records, news = load(write(tmp_path, *lists))
    assert [r["responses"] for r in records] == [row["responses"][1:] for row in LISTS]
    assert [r["rewards"] for r in records] == [row["rewards"][1:] for row in LISTS]
    assert "left out 60 times: an empty response" in news[0]


def test_an_empty_single_response_is_a_dropped_record(tmp_path):
    rows = rated(*range(40))
    rows[3]["response"] = " "
    records, news = load(write(tmp_path, *rows))
    assert len(records) == 39 and "1 of 40 records dropped" in news[0] and len(news) == 2


def test_lists_and_prompts_are_both_counted_where_they_differ(tmp_path):
    assert ", 60 prompts, 150 responses;" in load(write(tmp_path, *LISTS))[1][-1]
    news = load(write(tmp_path, *LISTS[:5] * 16))[1]
    assert ", 80 lists of 5 prompts, 192 responses;" in news[-1]


def test_nothing_left_says_what_there_was(tmp_path):
    tie = {"conversation_a": [], "conversation_b": [], "winner": "tie"}
    path = write(tmp_path, tie, tie)
    with pytest.raises(files.DataError, match=":1: nothing is left: a tie"):
        load(path)
    rows = [{"chosen": "Yes.", "rejected": "No."}]
    with pytest.raises(files.DataError, match="nothing is left: no prompt, and no beginning"):
        load(write(tmp_path, *rows))


# --------------------------------------------------------------------------- pairs without a prompt


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The pond is calm.", "The pond is made of soup.", "The pond is "),
        (
            "User: Pond?\nAssistant: Calm.",
            "User: Pond?\nAssistant: Call.",
            "User: Pond?\nAssistant:",
        ),
        ("[INST] Pond? [/INST] So calm.", "[INST] Pond? [/INST] So so.", "[INST] Pond? [/INST]"),
        (
            "<|user|>\nPond?\n<|assistant|>\nThe pond.",
            "<|user|>\nPond?\n<|assistant|>\nThe soup.",
            "<|user|>\nPond?\n<|assistant|>\n",
        ),
        (
            "A: Pond? Assistant: Yes. B: Sea? Assistant: Yes, it is.",
            "A: Pond? Assistant: Yes. B: Sea? Assistant: Yes, or no.",
            "A: Pond? Assistant: Yes. B: Sea? Assistant:",
        ),
    ],
)
def test_the_seam_is_the_last_turn_that_both_begin_not_the_longest_common_start(
    tmp_path, chosen, rejected, prompt
):
    (record,), _ = load(write(tmp_path, {"chosen": chosen, "rejected": rejected}))
    assert record["prompt"] == prompt
    assert record["responses"] == [chosen[len(prompt) :], rejected[len(prompt) :]]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Pond?"},
    {"role": "assistant", "content": "Calm."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "wet?"}],
    },
]
RENDERED = (
    "\n\nSystem: Be brief.\n\nHuman: Pond?\n\nAssistant: Calm.\n\nHuman: And wet?\n\nAssistant:"
)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value"), ("role", "text")])
def test_conversations_of_several_turns_have_their_last_reply_for_response(tmp_path, whole, names):
    respell = lambda turns: [{names[0]: t["role"], names[1]: t["content"]} for t in turns]
    reply = lambda text: [*(TURNS if whole else []), {"role": "assistant", "content": text}]
    row = {
        "prompt": respell(TURNS),
        "chosen": respell(reply("Yes, wet.")),
        "rejected": respell(reply("Yes.")),
    }
    expected = {"prompt": RENDERED, "responses": [" Yes, wet.", " Yes."], "rewards": [1.0, 0.0]}
    assert load(write(tmp_path, row))[0] == [expected]
    if whole:
        del row["prompt"]
        assert load(write(tmp_path, row))[0] == [expected]


def test_a_message_without_content_is_an_empty_one(tmp_path):
    row = {"prompt": "Pond?", "chosen": [{"role": "assistant", "content": None}]}
    row["rejected"] = [{"role": "assistant", "content": "Calm."}]
    records, news = load(write(tmp_path, row))
    assert records[0]["responses"] == [" Calm."] and "an empty response" in news[0]


# ------------------------------------------------------------------------------------------ the way


def test_the_short_way_of_records_is_the_long_way(tmp_path, monkeypatch):
    lists = [
        *LISTS,
        LISTS[0] | {"note": 1},
        LISTS[1] | {"prompt": "大海?"},
        LISTS[2] | {"rewards": [1, 0]},
        {"query": "Sea?", "responses": ["Wide.", "Soup."], "scores": [1, -0.5]},
        LISTS[4] | {"query": "Sea?", "scores": [0.0, 3.0, 4.0][: len(LISTS[4]["rewards"])]},
    ]
    path = write(tmp_path, *lists, LISTS[3] | {"prompt": "\ud800?"})
    short = load(path)
    monkeypatch.setattr(files, "plain_record", lambda row: None)
    assert load(path) == short and short[0][-1]["prompt"] == "??"
    assert all(list(r) == ["prompt", "responses", "rewards"] for r in short[0])


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_left_as_it_was(tmp_path, collecting):
    (gc.enable if collecting else gc.disable)()
    try:
        load(write(tmp_path, *LISTS))
        assert gc.isenabled() == collecting
        with pytest.raises(files.DataError):
            load(write(tmp_path, "{"))
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


def test_json_is_read_as_json_loads_does(tmp_path):
    text = json.dumps(LISTS[0])
    path = write(tmp_path, f"  {text}", f"{text}\t ", f"{text}\r", text.replace(": ", " :\t"))
    assert load(path)[0] == [LISTS[0]] * 4
    with pytest.raises(files.DataError, match=":2: not JSON .Extra data"):
        load(write(tmp_path, text, f"{text} ,"))


def test_a_large_file_is_counted_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, *[LISTS[0]] * 100_001)
    files.load([path], say=str)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    files.load([path], say=str)
    shown = capsys.readouterr().err
    assert re.findall(r"[\d,]+(?= rows)", shown) == ["50,000", "100,000"] and "\n" not in shown
    files.load([write(tmp_path, LISTS[0], name="few.jsonl")], say=str)
    assert capsys.readouterr().err == ""
