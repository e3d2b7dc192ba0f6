"""One step of learning: what the objective is given, the step itself, the row of the log."""

import dataclasses
import math

import pytest
import torch
from helpers import Memory, loop_state

import data
from harness import update
from harness.evaluation import enumerate_responses
from harness.pool import pool_metrics, precision, score_lists, with_responses
from model import response_logps
from objectives import OBJECTIVES, total

# ------------------------------------------------------------------------------------ the optimiser


def test_the_rate_warms_up_over_3_percent_of_the_steps_and_falls_to_0():
    rates = [update.lr_at(step, 100, 2.0) for step in range(100)]
    assert rates[:3] == pytest.approx([2.0 * k / 3 for k in (1, 2, 3)])
    assert rates[3:] == pytest.approx([2.0 * (100 - step) / 97 for step in range(3, 100)])
    assert update.lr_at(0, 1, 2.0) == 2.0  # a single step is made at the peak


def optimizer_of(*numbers):
    """(parameters, SGD over them), each in a group of its own, peak rate 1."""
    parameters = [torch.nn.Parameter(torch.tensor([number])) for number in numbers]
    return parameters, torch.optim.SGD([{"params": [p], "peak": 1.0} for p in parameters])


def test_each_network_is_clipped_by_itself_and_steps_at_its_own_rate():
    (a, b), optimizer = optimizer_of(0.0, 0.0)
    optimizer.param_groups[1]["peak"] = 0.1
    norms = update.update(optimizer, (30 * a + 0.5 * b).sum(), 2, 2, 1.0)
    rate = update.lr_at(1, 2, 1.0)
    assert norms == [30.0, 0.5] and b.item() == pytest.approx(-0.5 * 0.1 * rate)
    assert a.item() == pytest.approx(-1.0 * rate, rel=1e-4)


def test_steps_are_counted_from_1_and_gradients_are_of_this_step_alone():
    (a,), optimizer = optimizer_of(0.0)
    for step in (1, 2, 3):
        update.update(optimizer, 0.5 * a.sum(), step, 3, 1.0)
    assert a.item() == pytest.approx(-0.5 * sum(update.lr_at(k, 3, 1.0) for k in range(3)))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_is_changed(factor):
    (a, b), optimizer = optimizer_of(2.0, 3.0)
    with pytest.raises(FloatingPointError, match=r"step 7: loss is .*, gradient norm"):
        update.update(optimizer, (a + factor * b).sum(), 7, 9, 1.0)
    assert (a.item(), b.item()) == (2.0, 3.0)


@pytest.mark.parametrize("constant", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_also_where_its_gradient_is(constant):
    (a,), optimizer = optimizer_of(2.0)
    with pytest.raises(FloatingPointError, match=f"step 7: loss is {constant}, gradient norm 1$"):
        update.update(optimizer, (a + constant).sum(), 7, 9, 1.0)
    assert a.item() == 2.0


def test_the_norms_of_all_networks_are_told_where_one_is_not_finite():
    (a, b), optimizer = optimizer_of(2.0, 3.0)
    with pytest.raises(FloatingPointError, match="step 1: loss is inf, gradient norm 0.5 and inf$"):
        update.update(optimizer, (0.5 * a + math.inf * b).sum(), 1, 9, 1.0)


# ---------------------------------------------------------------------- what the objective is given


def test_one_value_for_the_batch_is_the_mean_of_those_of_its_prompts():
    c, world, state, _ = loop_state(objective="dro", evolve=1)
    batch = data.make_batch(with_responses(world.rounds[0][:3], [[[0]]] * 3), 0)
    with torch.no_grad():
        state.value_network.value_head.weight.normal_()
        apart = update.prompt_values(c, state.value_network, batch)
        together = update.prompt_values(
            dataclasses.replace(c, value="batch"), state.value_network, batch
        )
    assert apart.std() > 0 and torch.allclose(together, apart.mean().expand(3))


def test_mismatched_pairs_are_the_next_prompts_first_candidate_without_gradient():
    c, world, state, reference = loop_state(objective="kto", evolve=1)
    with torch.no_grad():
        state.policy.wpe.weight.add_(0.3)
    words = enumerate_responses(world)
    lists = [[words[0], words[80]], [words[20]], [words[100], words[5]]]
    examples = with_responses(world.rounds[0][:3], lists)

    def mismatched(*examples):
        batch = data.make_batch(examples, world.enc.eot_token)
        return update.mismatched_logps(world, state.policy, reference, batch)

    apart = with_responses(world.rounds[0][:3], [[words[20]], [words[100]], [words[0]]])
    for logps, model in zip(mismatched(*examples), (state.policy, reference)):
        expected = [row[0] for row in score_lists(c, world, model, apart)]
        assert logps.tolist() == pytest.approx(expected, abs=1e-5) and not logps.requires_grad
    assert [len(logps) for logps in mismatched(examples[0])] == [0, 0]
    twice = examples[0], examples[0], examples[1]  # one pair has the same prompt twice
    assert [len(logps) for logps in mismatched(*twice)] == [2, 2]


def step_of(objective, **settings):
    """(c, state, x, losses, given) of a batch of two prompts with three and two candidates.

    x is what the log is made of, `given` what the objective was given.
    """
    c, world, state, reference = loop_state(objective=objective, evolve=1, **settings)
    words = enumerate_responses(world)
    examples = with_responses(world.rounds[0][:2], [[words[3], words[90], words[200]], words[5:7]])
    for example, rewards in zip(examples, ([0.5, 2.0, -1.0], [1.0, 3.0])):
        example.rewards = rewards
    state.pool_metrics = pool_metrics(examples)
    if "reference" in OBJECTIVES[objective].needs:
        scores = score_lists(c, world, reference, examples)
        examples = [dataclasses.replace(e, ref_logps=row) for e, row in zip(examples, scores)]
    batch = data.make_batch(examples, world.enc.eot_token)
    logps = response_logps(state.policy, batch, world.allowed)
    x = update.objective_inputs(c, world, state, reference, batch, logps)
    losses = OBJECTIVES[objective].loss(c, x)
    return c, state, update.with_reference(c, world, reference, batch, x), losses, x


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if row.loss])
def test_an_objective_is_given_what_its_row_says_that_it_needs(objective):
    _, _, logged, losses, x = step_of(objective)
    needs = OBJECTIVES[objective].needs
    assert x.logps.shape == x.rewards.shape == x.mask.shape == logged.ref_logps.shape == (2, 3)
    assert (x.ref_logps is not None) == (x is logged) == ("reference" in needs)
    assert x.mask.tolist() == [[True, True, True], [True, True, False]]
    assert x.lengths.tolist() == [[2, 4, 4], [2, 2, 0]] and x.rewards[1].tolist() == [1, 3, 0]
    assert (x.values is not None) == ("values" in needs)
    assert (x.mismatched is not None) == ("mismatched" in needs)
    assert total(losses).isfinite() and total(losses).requires_grad


# ------------------------------------------------------------------------- a batch read in N parts


def ragged_step(objective, **settings):
    """step(parts) -> x, losses, gradients of each network, of a batch of eight ragged lists.

    Policy and value network have moved away from the reference.
    """
    c, world, state, reference = loop_state(
        objective=objective, evolve=1, candidates=2, batch_size=8, **settings
    )
    words = enumerate_responses(world)
    lengths = [2] * 8 if "pairs" in OBJECTIVES[objective].needs else [3, 1, 2, 4, 3, 2, 1, 4]
    lists = [words[40 * i + 3 : 584 : 97][:n] for i, n in enumerate(lengths)]
    examples = with_responses(world.rounds[0][:8], lists)
    scores = score_lists(c, world, reference, examples)
    for i, (example, logps) in enumerate(zip(examples, scores)):
        example.rewards = [math.sin(3 * i + j) for j in range(len(logps))]
        example.ref_logps = logps if "reference" in OBJECTIVES[objective].needs else None
    batch = data.make_batch(examples, world.enc.eot_token)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (p for group in state.optimizer.param_groups for p in group["params"]):
            p.add_(0.1 * torch.randn_like(p))

    def step(parts):
        n = dataclasses.replace(c, grad_accum=parts)
        with precision(c):
            logps = update.policy_logps(n, world, state.policy, batch)
            x = update.objective_inputs(n, world, state, reference, batch, logps)
        losses = OBJECTIVES[objective].loss(n, x)
        state.optimizer.zero_grad()
        total(losses).backward()
        gradients = [
            torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None])
            for group in state.optimizer.param_groups
        ]
        return x, losses, gradients

    return step


@pytest.mark.parametrize(
    "settings",
    [
        *({"objective": name} for name, row in OBJECTIVES.items() if row.loss),
        {"objective": "dro", "value": "batch"},
        {"objective": "dro", "share_networks": True},
        *({"objective": name, "model": "t5"} for name in ("lire", "dro", "dpo", "kto")),
    ],
    ids=str,
)
def test_one_times_eight_is_eight_times_one(settings):
    step = ragged_step(**settings)
    x, losses, gradients = step(1)
    for parts in (8, 3):  # one by one; three, three and two
        y, others, found = step(parts)
        for one, other in zip(x, y):
            torch.testing.assert_close(other, one, rtol=0, atol=2e-6)
        for name, loss in losses.items():
            torch.testing.assert_close(others[name], loss, rtol=1e-6, atol=1e-5)
        for one, other in zip(gradients, found, strict=True):
            assert one.norm() > 0 and (other - one).norm() < 2e-6 * one.norm()


@pytest.mark.parametrize("model", ["gpt", "t5"])
def test_parts_in_bfloat16_add_their_gradients_up_in_float32(model):
    exact, whole = (ragged_step("lire", model=model, dtype=x)(1) for x in ("float32", "bfloat16"))
    parts = ragged_step("lire", model=model, dtype="bfloat16")(8)
    torch.testing.assert_close(parts[0].logps, whole[0].logps, rtol=0, atol=1e-6)
    error, of_whole = ((result[2][0] - exact[2][0]).norm() for result in (parts, whole))
    assert of_whole > 0 and error < 1.1 * of_whole


@pytest.mark.parametrize("settings", [{}, {"model": "t5"}], ids=str)
def test_activations_of_one_part_are_held_at_a_time(settings):
    """Of policy and value network, in 2 parts and in 8; beside them, the gradients."""
    c, world, state, _ = loop_state(objective="dro", evolve=1, batch_size=8, **settings)
    examples = with_responses(world.rounds[0][:8], [enumerate_responses(world)[200:232]] * 8)
    long = [dataclasses.replace(e, prompt_ids=(80 * e.prompt_ids)[:80]) for e in examples]
    batch = data.make_batch(long, world.enc.eot_token)

    def most(score, parts):
        state.optimizer.zero_grad()
        with Memory() as memory:
            score(dataclasses.replace(c, grad_accum=parts)).sum().backward()
        return memory.most

    gradients = sum(4 * p.numel() for p in state.policy.parameters())
    for score in (
        lambda c: update.policy_logps(c, world, state.policy, batch),
        lambda c: update.prompt_values(c, state.value_network, batch),
    ):
        whole, halves, eighths = (most(score, parts) - gradients for parts in (1, 2, 8))
        assert halves < 0.7 * whole and eighths < 0.3 * whole


# ------------------------------------------------------------------------------- the row of the log


def test_a_row_says_where_the_run_is_and_how_each_part_of_the_loss_stands():
    c, state, x, losses, _ = step_of("dro")
    state.step, state.round_index = 7, 2
    row = update.step_metrics(c, state, x, losses, [0.5, 0.25])
    assert (row["step"], row["round"], row["learning_rate"]) == (7, 2, c.lr)
    assert (row["grad_norm"], row["value/grad_norm"]) == (0.5, 0.25)
    assert row["loss"] == pytest.approx(row["loss/policy"] + row["loss/value"])
    assert row["loss/value"] == pytest.approx(losses["loss/value"].mean().item())
    assert {"rewards/implied", "residual/rms", "value/mean", "rewards/margins"} <= set(row)
    assert (row["lists/distinct"], row["lists/tied"]) == (1, 0)
    c, state, x, losses, _ = step_of("lire")
    row = update.step_metrics(c, state, x, losses, [0.5])
    assert {"candidates/entropy", "rewards/expected", "logps/chosen"} <= set(row)
    assert "value/grad_norm" not in row and "residual/rms" not in row


def test_nan_and_inf_become_null():
    metrics = {"a": math.nan, "b": math.inf, "c": 1.5, "d": None, "e": 2, "f": "text"}
    expected = {"a": None, "b": None, "c": 1.5, "d": None, "e": 2, "f": "text"}
    assert update.finite(metrics) == expected and math.isnan(metrics["a"])
