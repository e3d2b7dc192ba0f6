"""The benchmark's numbers that do not depend on time."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as models
from experiments import bench

B, M, S, R = 3, 2, 7, 5


def test_token_ratio_is_tokens_over_tokens():
    for M, S, R in [*bench.SHAPES, (1, 7, 5)]:
        repeated = sum(S + R for _ in range(M))
        once = S + sum(R for _ in range(M))
        assert bench.token_ratio(M, S, R) == repeated / once
    assert bench.token_ratio(8, 64, 16) == pytest.approx(10 / 3)
    assert bench.token_ratio(1, 64, 16) == 1


def test_useful_flops_by_hand():
    """L = 1, D = 2, V = 3; 2 lists of M = 2, S = 3, R = 2.

    3 + 2 tokens are read, of which the last 3 states meet the head.
    """
    blocks = 6 * (12 * 2 * 2) * (3 + 2 * 1)
    head = 6 * (3 * 2) * (1 + 2 * 1)
    # A prompt token with those up to itself, a response token with prompt and itself.
    pairs = (1 + 2 + 3) + 2 * (3 + 1)
    # Forward and twice that backward; multiply-add = 2; q k and weights v, D each.
    attention = 3 * 2 * (2 * 2) * pairs
    config = models.GPTConfig(vocab_size=3, layers=1, heads=1, width=2)
    assert bench.useful_flops(config, 2, 2, 3, 2) == 2 * (blocks + head + attention)


def test_useful_flops_are_those_of_the_matrix_products_that_run():
    """Blocks and head by torch's own counter.

    The head sees the last prompt state M times; once would do.
    """
    model, once, _ = bench.setup("default", (M, S, R), "cpu", B)
    with FlopCounterMode(display=False) as counter:
        bench.update(model, once)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    c = model.config
    pairs = S * (S + 1) / 2 + M * sum(S + t for t in range(1, R))
    expected = bench.useful_flops(c, B, M, S, R) - B * 12 * c.layers * c.width * pairs
    assert products == expected + B * (M - 1) * 6 * c.vocab_size * c.width


def test_models_have_the_size_they_are_named_for():
    for name, millions in (("default", 0.5), ("5m", 5), ("gpt2", 124.44)):
        with torch.device("meta"):
            model = models.GPT(models.GPTConfig(**{"context": 288} | bench.MODELS[name][2]))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_both_variants_score_and_learn_the_same():
    model, once, repeated = bench.setup("default", (M, S, R), "cpu", B)
    assert once.prompt_ids.shape == (B, S) and once.response_ids.shape == (B, M, R)
    assert repeated.prompt_ids.shape == (B * M, S) and repeated.response_ids.shape == (B * M, 1, R)
    assert once.response_mask.all() and once.prompt_mask.all()
    assert bench.disagreement(model, once, repeated) < 1e-4
    gradients = []
    for batch in (once, repeated):
        bench.update(model, batch)
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    repeated.prompt_ids[0, 0] = (repeated.prompt_ids[0, 0] + 1) % model.config.vocab_size
    with pytest.raises(ValueError, match="differ by"):
        bench.disagreement(model, once, repeated)


def test_sampling_with_and_without_the_cache_draws_the_same_tokens():
    model, once, _ = bench.setup("default", (M, S, R), "cpu", B)

    def draw(sampler):
        generator = torch.Generator().manual_seed(0)
        return sampler(model, once.prompt_ids, once.prompt_mask, M, R, generator)

    ids, mask = draw(models.sample)
    assert mask.all() and torch.equal(draw(bench.sample_uncached), ids)


def test_quartiles_and_pairs():
    assert bench.quartiles([5, 1, 2, 4, 3]) == [2, 3, 4]
    assert bench.quartiles([7]) == [7, 7, 7]
    order = []
    times = bench.timed_pairs(lambda: order.append("f"), lambda: order.append("g"), 3, "cpu")
    assert "".join(order) == "fg" + "fg" + "gf" + "fg" and [len(t) for t in times] == [3, 3]


def test_the_whole_benchmark_at_its_smallest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "peak_flops", lambda device: 1e12)
    result = bench.main(["--quick", "--pairs", "1", "--shapes", "2,3,2"])
    assert json.loads((tmp_path / "out/bench.json").read_text()) == result
    [row] = result["rows"]
    expected = {"model": "default", "B": 16, "M": 2, "S": 3, "R": 2, "pairs": 1}
    assert {name: row[name] for name in expected} == expected
    assert row["reached"] == row["ratio"][1] / row["token_ratio"] and row["token_ratio"] == 10 / 7
    flops = bench.useful_flops(models.GPTConfig(), 16, 2, 3, 2)
    assert row["peak_once"] == pytest.approx(flops / row["once"][1] / 1e12)
    assert row["flops_ratio"] == bench.useful_flops(models.GPTConfig(), 16 * 2, 1, 3, 2) / flops
    assert row["memory_once"] >= 0 and row["memory_repeated"] >= 0
    assert bench.show(row) in capsys.readouterr().out


def test_utilisation_is_useful_operations_over_what_the_data_sheet_promises(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    flops = bench.useful_flops(models.GPTConfig(), B, M, S, R)
    peaks = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
    for card, peak in (peaks | {"NVIDIA H100 NVL": 835e12, "another card": None}).items():
        rows = bench.utilisation(card, "default", B, (M, S, R), "cpu", 2)
        assert [row["how"] for row in rows] == ["eager", "compiled"]
        for row, line in zip(rows, capsys.readouterr().out.splitlines(), strict=True):
            seconds = row["seconds"][1]
            assert row["flops"] == pytest.approx(flops / seconds)
            assert row["mfu"] == (peak and pytest.approx(flops / seconds / peak))
            assert row["tokens"] == pytest.approx(B * (S + M * R) / seconds)
            assert line.startswith(row["how"]) and line.endswith(
                f"MFU {row['mfu']:.0%} of {peak / 1e12:.0f}" if peak else "MFU -"
            )
    assert compiled == [models.response_logps] * 5


def test_an_update_of_the_benchmark_learns():
    """The first candidate of each list earns all: LIRE makes it likelier."""
    model, batch, _ = bench.setup("default", (M, S, R), "cpu", B)
    batch.rewards[:, 0] = 1.0
    step = bench.lire_update(model, batch, "cpu", compiled=False)
    share = lambda: models.response_logps(model, batch).softmax(-1)[:, 0].mean()
    with torch.no_grad():
        before = share()
    for _ in range(20):
        step()
    assert share() > before


def test_without_a_gpu_there_is_one_line_on_its_utilisation(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--mfu"]) == {}
    assert capsys.readouterr().out == "--mfu is of a GPU's peak, and torch sees no GPU here\n"


IMPOSSIBLE = ["--shapes 8,64", "--shapes 8,0,2", "--shapes a", "--pairs 0", "--model t5"]


@pytest.mark.parametrize("options", [options.split() for options in IMPOSSIBLE])
def test_impossible_options_end_with_one_line(options, capsys):
    with pytest.raises(SystemExit):
        bench.main(options)
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_the_whole_benchmark_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--quick", "--pairs", "1", "--shapes", "2,32,16", "--device", "cuda"]
    [row] = bench.main(options)["rows"]
    assert row["memory_repeated"] > row["memory_once"] > 0
    rows = bench.utilisation(torch.cuda.get_device_name(), "default", 2, (2, 32, 16), "cuda", 1)
    assert all(row["tokens"] > 0 for row in rows)
