"""One CUDA GPU: the CPU's numbers, short runs, memory. Without a GPU all of it is skipped."""

import dataclasses
import math

import pytest
import torch
from helpers import failing, log, loop_state, small
from test_model import (
    EOS,
    FIVE,
    FIVE_PROMPTS,
    WEIGHTS,
    M,
    R,
    as_lists,
    check_gradients,
    chi_square,
    enumerated_probs,
    gradients,
    ragged_batch,
    ragged_examples,
    random_model,
)
from test_t5 import MODELS

import model as models
import train
from data import make_batch
from harness import update
from harness.command_line import command_line
from harness.pool import precision, with_responses
from harness.run import Progress
from model import GPT, GPTConfig, response_logps, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def most(call):
    """Bytes on the GPU at most while call() runs, beside those that are there already."""
    call()  # the first call makes workspaces that stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("kind", MODELS)
def test_logits_scores_and_gradients_are_those_of_the_cpu(kind):
    model, batch = MODELS[kind](), ragged_batch()
    inputs = batch.prompt_ids, batch.prompt_mask, batch.response_ids
    logits, logps = model(*inputs), response_logps(model, batch)
    expected = gradients(model, (WEIGHTS * logps).sum())
    model, there = model.cuda(), make_batch(ragged_examples(), EOS, "cuda")
    inputs = there.prompt_ids, there.prompt_mask, there.response_ids
    real = batch.response_mask
    torch.testing.assert_close(model(*inputs).cpu()[real], logits[real], rtol=1e-4, atol=1e-4)
    found = response_logps(model, there)
    torch.testing.assert_close(found.cpu(), logps, rtol=1e-4, atol=1e-4)
    on_gpu = gradients(model, (WEIGHTS.cuda() * found).sum())
    check_gradients({name: grad.cpu() for name, grad in on_gpu.items()}, expected, 1e-3)


def test_samples_follow_the_scores():
    model = random_model(torch.float32, **FIVE)
    probs, model = enumerated_probs(model), model.cuda()
    prompts = [x.cuda() for x in FIVE_PROMPTS]
    lists = as_lists(*sample(model, *prompts, 6000, 3, torch.Generator("cuda").manual_seed(1)))
    for i in range(2):
        assert chi_square(lists[i], probs[i]) < 84 + 5 * 13


@pytest.mark.parametrize("most_logits", [models.MOST_LOGITS, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_scores_in_float32(kind, most_logits, monkeypatch):
    monkeypatch.setattr(models, "MOST_LOGITS", most_logits)
    model, batch = MODELS[kind]().cuda(), make_batch(ragged_examples(), EOS, "cuda")
    exact = response_logps(model, batch)
    with torch.autocast("cuda", torch.bfloat16):
        logps = response_logps(model, batch)
        ids, _ = sample(model, batch.prompt_ids, batch.prompt_mask, M, R, torch.Generator("cuda"))
    assert logps.dtype == torch.float32 and ids.shape[:2] == (len(logps), M)
    assert ((logps - exact).abs() <= 0.2 * batch.response_mask.sum(-1)).all()
    assert all(grad.isfinite().all() for grad in gradients(model, logps.sum()).values())


def test_a_batch_comes_whole_and_nobody_waits_for_it():
    batch = ragged_batch()
    progress, loss = Progress("lire", 10), torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = make_batch(ragged_examples(), EOS, "cuda")
        progress.shown = math.inf  # not due
        progress.show(1, loss, {})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for field in dataclasses.fields(batch):
        here, copy = getattr(batch, field.name), getattr(there, field.name)
        assert copy is here is None or torch.equal(copy.cpu(), here), field.name


# --------------------------------------------------------------------------------------- short runs

LIRE = {"reference_steps": 200, "steps": 100, "evolve": 2}
DRO = {"reference_steps": 60, "steps": 200, "evolve": 1, "lr": 2e-3, "tau": 0.5}
SIZES = {"batch_size": 16, "reference_batch": 16, "eval_prompts": 20, "width": 64}


@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"grad_accum": 4}], ids=str)
@pytest.mark.parametrize("objective, own", [("lire", LIRE), ("dro", DRO)], ids=["lire", "dro"])
def test_a_short_run_improves_the_reward(tmp_path, objective, own, how):
    settings = {"device": "cuda", "objective": objective, **SIZES, **own, **how}
    metrics = train.main(small(tmp_path / "run", **settings))
    assert metrics["policy_reward"] > metrics["reference_reward"] + 0.1
    rows = log(tmp_path / "run")
    assert rows[-1]["step"] == own["steps"] and all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("objective", ["lire", "dro"])
def test_a_run_that_is_cut_goes_on(tmp_path, objective):
    """Sums may be added up in another order on a GPU, so it is the same run, and not its bits."""
    settings = {"device": "cuda", "objective": objective, "evolve": 1, "reference_steps": 20}
    train.main(small(tmp_path / "whole", **settings))
    with failing(6, objective), pytest.raises(OSError):
        train.main(small(tmp_path / "cut", **settings))
    metrics = train.main(command_line(["--resume", str(tmp_path / "cut")]))
    whole, cut = log(tmp_path / "whole"), log(tmp_path / "cut")
    assert [row["step"] for row in cut] == [row["step"] for row in whole] == [1, 4, 8, 10, 12]
    for one, other in zip(whole, cut):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2, abs=1e-2)
        assert other["logps/chosen"] == pytest.approx(one["logps/chosen"], rel=1e-2, abs=1e-2)
    assert math.isfinite(metrics["policy_reward"])


# ------------------------------------------------------------------------------------------- memory


def test_logits_of_all_tokens_are_never_there_at_once(monkeypatch):
    """V = 50,257, M = 8, R = 128: 206 MB of logits, of which a backward pass has three copies."""
    model = GPT(GPTConfig(vocab_size=50257, layers=1, heads=1, width=64)).cuda()
    ids = torch.randint(50257, (8, 128)).tolist()
    batch = make_batch([train_list(ids)], 0, "cuda")

    def call():
        model.zero_grad()
        response_logps(model, batch).sum().backward()

    chunks = most(call)
    monkeypatch.setattr(models, "MOST_LOGITS", 2**40)
    whole = most(call)
    assert whole > 2 * 4 * 50257 * 8 * 128 and chunks < 0.5 * whole


def train_list(ids):
    """An Example of these responses."""
    return dataclasses.replace(ragged_examples()[0], response_ids=ids, rewards=[0.0] * len(ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_batch_take_less_memory_and_give_the_same_gradients(dtype):
    size = {"layers": 4, "heads": 4, "width": 128, "candidates": 8, "batch_size": 16}
    c, world, state, _ = loop_state(device="cuda", task="dialogue", evolve=1, dtype=dtype, **size)
    lists = [torch.randint(500, (8, 100)).tolist() for _ in range(16)]
    batch = make_batch(with_responses(world.rounds[0][:16], lists), EOS, "cuda")
    memory, found = [], []
    for parts in (1, 8):
        own = dataclasses.replace(c, grad_accum=parts)

        def call(own=own):
            state.optimizer.zero_grad()
            with precision(own):
                logps = update.policy_logps(own, world, state.policy, batch)
            (logps / 100).sum().backward()

        memory.append(most(call))
        found.append(torch.cat([p.grad.flatten() for p in state.policy.parameters()]))
    assert memory[1] < 0.4 * memory[0]
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert error < (1e-4 if dtype == "float32" else 1e-2)
