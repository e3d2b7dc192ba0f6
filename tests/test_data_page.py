"""docs/data.md is executed: its table, a line of each format, its commands on made-up files."""

import csv
import gzip
import json
import math
import re
import shlex

import pytest
from helpers import ROOT, SMALL, small

import files
import formats
import records
import train
from harness.command_line import command_line

PAGE = (ROOT / "docs/data.md").read_text()
LINES = dict(re.findall(r"^([\w-]+) +(\{.*\})$", PAGE, re.M))
COMMANDS = re.findall(r"^python (train.py .*)$", PAGE, re.M)


def test_the_table_is_that_of_formats():
    assert formats.table() in PAGE


def test_every_format_has_a_line():
    assert list(LINES) == list(formats.FORMATS)


def lines_of(name, index=0):
    """The page's line of a format, as the rows of a list; each index has a prompt of its own."""
    line = LINES[name] if index == 0 else re.sub("pond|frog", rf"\g<0> {index}", LINES[name])
    if index % 2:  # where a row is one response, every other one is worse
        line = re.sub(r'"(helpfulness|overall|score|rating)": \d', r'"\1": 1', line)
        line = re.sub(r'"(label|kto_tag)": true', r'"\1": false', line)
    if name != "oasst":
        return [line]
    reply = json.loads(line) | {"message_id": f"b{index}", "parent_id": f"a{index}"}
    asked = {"message_id": f"a{index}", "parent_id": None, "role": "prompter"}
    asked["text"] = f"Is pond {index} calm?"
    other = {"message_id": f"c{index}", "text": "Soup.", "rank": 1}
    return [json.dumps(row) for row in (reply, reply | other, reply | asked)]


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_recognised_and_read(tmp_path, name):
    news = []
    assert files.recognise(json.loads(LINES[name])) == name
    (tmp_path / "line").write_text("\n".join(lines_of(name)))
    (record,) = files.load([tmp_path / "line"], say=news.append)
    assert formats.FORMATS[name].title in news[-1]
    best = record["responses"][record["rewards"].index(max(record["rewards"]))]
    assert "Soup" not in best and "Cars" not in best


TINY = {"reference_steps": 1, "steps": 1, "width": 16, "max_response": 12, "vocab_size": 300}


@pytest.mark.parametrize("name", LINES)
def test_a_run_learns_from_every_format(tmp_path, capsys, name):
    (tmp_path / "file").write_text("\n".join(x for i in range(1, 61) for x in lines_of(name, i)))
    single, objective = formats.FORMATS[name].grouped, "lire"
    if single:
        objective = "kto" if "1 up" in formats.FORMATS[name].becomes else "dro"
    metrics = train.main(
        small(tmp_path / "run", data=[str(tmp_path / "file")], objective=objective, **TINY)
    )
    out = capsys.readouterr().out
    assert formats.FORMATS[name].title in out and "60 prompts" in out
    assert math.isfinite(metrics["kl"]) and metrics["policy_length"] > 0
    if not single:  # what the lists are compared by
        assert metrics["best_reward"] > metrics["mean_reward"]
        assert 0 <= metrics["pair_accuracy_policy_sum"] <= 1


def test_the_conversation_is_rendered_as_it_says():
    turns = [("system", "Be brief."), ("user", "Is the pond calm?")]
    assert repr(records.render(turns) + records.TURN)[1:-1] in PAGE


WORDS = "calm wet quiet deep green cold wide still dark clear".split()


def made_up(index):
    """(prompt, good response, bad response)"""
    return (
        f"What is pond {index} like?",
        f"It is {WORDS[index % 10]}.",
        f"Soup, {WORDS[index // 10 % 10]}!",
    )


def hh(index):
    prompt, good, bad = made_up(index)
    start = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": start + good, "rejected": start + bad}


def ultrafeedback(index):
    prompt, good, bad = made_up(index)
    texts = [good, bad, f"{good} Very.", f"{bad} No."]
    scores = [4.5, 1.5, 4.0, None]
    rating = {"annotations": {"helpfulness": {"Rating": "1"}, "honesty": {"Rating": "N/A"}}}
    pairs = zip(texts, scores)
    return {
        "instruction": prompt,
        "completions": [{"response": t, "fine-grained_score": s} | rating for t, s in pairs],
    }


def thumb(index):
    prompt, good, bad = made_up(index)
    return {
        "prompt": prompt,
        "completion": bad if index % 20 == 0 else good,
        "label": index % 20 > 0,
    }


def rating(index):
    prompt, good, bad = made_up(index)
    return {"prompt": prompt, "response": good if index % 2 else bad, "rating": 1 + index % 2 * 3}


# The reward in the README.
MINE = re.search(r"```python\n(KIND = .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
FILES = {
    "hh/train.jsonl.gz": [hh(i) for i in range(60)],
    "hh/test.jsonl.gz": [hh(i) for i in range(60, 70)],
    "ultrafeedback/a.jsonl": [ultrafeedback(i) for i in range(30)],
    "ultrafeedback/b.jsonl": [ultrafeedback(i) for i in range(30, 60)],
    "thumbs.jsonl": [thumb(i) for i in range(100)],
    "ratings.csv": [rating(i) for i in range(60)],
    "ponds.jsonl": [rating(i) for i in range(60)],
}
SAID = [
    ["hh/train.jsonl.gz: Anthropic HH transcripts, 60 prompts, 120 responses; best of"],
    ["ultrafeedback/a.jsonl: UltraFeedback lists, 30 prompts, 120 resp", "ultrafeedback/b.jsonl: "],
    ["thumbs.jsonl: thumbs up or down, 100 prompts, 100 responses; record 1: 'Soup,"],
    ["ratings.csv: single responses, 60 prompts, 60 responses; record 1: 'Soup, calm!' earns 1"],
    ["ponds.jsonl: single responses, 60 prompts", "pool 10/10: ", "best_of_8_reward"],
]


@pytest.mark.parametrize("command, said", list(zip(COMMANDS, SAID, strict=True)))
def test_a_command_runs_on_a_made_up_file(tmp_path, monkeypatch, capsys, command, said):
    monkeypatch.chdir(tmp_path)
    for name, rows in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "wt", newline="") as file:
            if name.endswith(".csv"):
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "mine.py").write_text(MINE)
    small = {k: v for k, v in SMALL.items() if k not in ("task", "evolve")}
    small |= {"steps": 10, "reference_steps": 4, "vocab_size": 300, "device": "cpu"}
    extra = [w for k, v in small.items() for w in ("--" + k.replace("_", "-"), str(v))]
    metrics = train.main(command_line(shlex.split(command)[1:] + extra))
    assert math.isfinite(metrics["kl"])
    if "best_reward" in metrics:  # single responses are not compared
        assert metrics["best_reward"] > metrics["mean_reward"]
    out = capsys.readouterr().out
    for line in said:
        assert line in out
