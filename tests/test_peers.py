"""What the benchmark calls the same update by others is the same; their times are not tested."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as models
from experiments import bench, peers

pytest.importorskip("transformers", reason="the peer: pip install transformers")
M, S, R = 3, 7, 5


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.setitem(bench.MODELS, "small", (2, 1, {"layers": 2, "width": 8, "heads": 2}))
    return bench.setup("small", (M, S, R), "cpu")


def test_transformers_scores_and_learns_as_ours_does(setup):
    model, once, _ = setup
    other = peers.hf_model(model, "cpu")
    ours, theirs = models.response_logps(model, once), peers.hf_logps(other, once)
    assert ours.shape == (2, M) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    ours.mean().backward(), theirs.mean().backward()
    theirs = other.transformer.wte.weight.grad
    torch.testing.assert_close(model.wte.weight.grad, theirs, atol=1e-5, rtol=0)
    row = peers.hf_row(model, once, 2, "cpu")
    assert row["apart"] < 1e-4 and row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2]
    assert min(row["ours"] + row["theirs"]) > 0


def test_a_peer_that_scores_otherwise_is_no_peer(setup, monkeypatch):
    model, once, _ = setup
    right = peers.hf_logps
    monkeypatch.setattr(peers, "hf_logps", lambda other, batch: right(other, batch) / R)
    with pytest.raises(ValueError, match="nothing to compare"):
        peers.hf_row(model, once, 1, "cpu")


def test_the_operations_of_transformers_are_those_that_it_runs(setup):
    """Products of blocks and head by torch's counter, which sees no attention on a CPU."""
    model, once, _ = setup
    c, B = model.config, 2
    other = peers.hf_model(model, "cpu")
    with FlopCounterMode(display=False) as counter:
        peers.hf_logps(other, once).mean().backward()
    attention = B * M * 6 * c.layers * c.width * (S + R) * (S + R + 1)
    counted = counter.get_total_flops()
    own = sum(
        sum(n for op, n in ops.items() if "attention" in str(op))
        for ops in [counter.get_flop_counts()["Global"]]
    )
    assert counted - own == peers.hf_flops(c, B, M, S, R) - attention


def test_random_pairs_as_text_are_the_same_tokens():
    V = 13
    examples = peers.random_pairs(4, S, R, V)
    tokenizer = peers.word_tokenizer(V)
    for example in examples:
        text = peers.as_text(example)
        assert tokenizer(text["prompt"]).input_ids == example.prompt_ids
        for side, ids in zip(("chosen", "rejected"), example.response_ids):
            assert tokenizer(text["prompt"] + text[side] + "</s>").input_ids == (
                example.prompt_ids + ids
            )
        assert len(example.prompt_ids) == S and {len(y) for y in example.response_ids} == {R}


def test_trl_makes_the_same_steps():
    for name in ("trl", "datasets"):
        pytest.importorskip(name, reason="the peer: pip install trl datasets")
    torch.manual_seed(0)
    model = models.GPT(models.GPTConfig(vocab_size=13, context=16, layers=1, heads=2, width=8))
    row = peers.trl_row(model, 4, S, R, 3)
    assert row["apart"] < 1e-4 and len(row["ours"]) == 3


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(bench.PEERS, "trl", ("no_such_package", []))
    with pytest.raises(SystemExit):
        bench.main(["--peer", "trl"])
    assert "--peer trl needs: pip install no_such_package" in capsys.readouterr().err


def test_the_table_and_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--peer", "hf", "--model", "default", "--shapes", "2,5,3", "--pairs", "1"]
    result = bench.main(argv)
    (row,) = result["rows"]
    assert (row["M"], row["S"], row["R"], row["pairs"]) == (2, 5, 3, 1)
    assert row["flops_ratio"] > 1 and row["token_ratio"] == 16 / 11
    assert (tmp_path / "results" / "bench-hf.json").exists()
    header, line = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[0] == "model" and line.split()[:5] == ["default", "16", "2", "5", "3"]
    page = peers.table(result).splitlines()
    assert len(page) == 3 and page[2].startswith("| default | 16 | 2, 5, 3 |")
    assert {text.count("|") for text in page} == {9}
