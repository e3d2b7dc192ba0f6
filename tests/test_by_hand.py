"""Right values written out by hand, in worlds so small that they can be.

In the world of coins a prompt is "x" or "y", a response is "good" or "bad" with EOS behind it, and
a model is two coins: P(good | x) and P(good | y). So KL, optimum and V* are closed forms, and a
coin of two like faces says the same whatever the random numbers are.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import LISTS, close, failing, loop_state, problem, same, small, untrained, write

import data
import frontier
import objectives
import train
from harness import config, evaluation, figures, pool, reference, run, update
from harness.command_line import command_line
from harness.config import ConfigError, resolve
from objectives import OBJECTIVES, Inputs

WORTH = {"x": {"good": 1.0, "bad": 0.0}, "y": {"good": 0.0, "bad": 3.0}}  # rewards
SURE = 1 - 1e-12  # of a coin of two like faces


def world_of_coins(task=True):
    """A world whose held-out prompts are x and y; without a task it has no rewards."""
    enc = data.encoding(data.word_ranks([" good", " bad"]))
    coins = data.Task(
        "coins",
        train=[],
        heldout=["x", "y"],
        ood=[],
        answers=lambda prompt, rng: [],
        reward=lambda prompt, response: WORTH[prompt][response.strip()],
        max_response=2,
        breakdown=lambda prompt, response: {"praise": float("good" in response)},
        words=["good", "bad"],
    )
    world = pool.World(enc, coins if task else None, data.allowed_tokens(coins, enc, 2), 2)
    world.heldout = asked(world, "x", "y")
    return world


def asked(world, *prompts, responses=(), rewards=()):
    """Examples of these prompts, each with these responses."""
    row = {"responses": list(responses), "rewards": list(rewards)}
    return data.tokenize([{"prompt": prompt, **row} for prompt in prompts], world.enc)


class Coins(torch.nn.Module):
    """A model: P(good) after x and after y."""

    def __init__(self, world, after_x, after_y):
        super().__init__()
        eos, self.V = world.enc.eot_token, world.enc.n_vocab
        self.config = types.SimpleNamespace(eos=eos, vocab_size=self.V)
        self.good = world.enc.encode_single_token(" good")
        odds = torch.zeros(self.V)
        for prompt, share in (("x", after_x), ("y", after_y)):
            odds[world.enc.encode_single_token(prompt)] = math.log(share / (1 - share))
        self.odds = torch.nn.Parameter(odds)

    def head(self, states):
        return states * torch.nn.functional.one_hot(torch.tensor(self.good), self.V)

    def hidden(self, prompt_ids, prompt_mask, response_ids, response_mask=None):
        return self.odds[prompt_ids[:, 0]][:, None, None, None].expand(*response_ids.shape, 1)

    def decode(self, prompt_ids, prompt_mask, M, max_tokens):
        states = self.odds[prompt_ids[:, 0]].repeat_interleave(M)[:, None]
        return self.head(states), lambda ids, rows: torch.zeros(len(ids), self.V)


def state_of(policy, value=None, scale=None):
    return types.SimpleNamespace(policy=policy, value_network=value, reward_scale=scale)


def settings(objective="lire", **own):
    return resolve(small("unused", objective=objective, **own))


def kl(own, other):
    """Of one coin from another."""
    tails = (1 - own) * math.log((1 - own) / (1 - other))
    return own * math.log(own / other) + tails


def tilted(base, gap, tau):
    """P*(good) of a reference's coin, where good is worth `gap` more than bad."""
    return 1 / (1 + (1 - base) / base * math.exp(-gap / tau))


def value(base, good, bad, tau):
    """V* of a reference's coin and what its sides are worth."""
    return tau * math.log(base * math.exp(good / tau) + (1 - base) * math.exp(bad / tau))


# ----------------------------------------------------------------------------- the enumerated world


def test_a_policy_that_is_the_optimum_at_a_tau_is_measured_as_that():
    c, world, tau, q = settings(), world_of_coins(), 2.0, (0.5, 0.25)
    p = tilted(q[0], 1, tau), tilted(q[1], -3, tau)
    metrics, answers, picture = evaluation.evaluate_task(
        c, world, Coins(world, *p), Coins(world, *q), world.heldout, "heldout"
    )
    kls = [kl(*pair) for pair in zip(p, q)]
    close(metrics["kl"], sum(kls) / 2, 1e-5)
    close(metrics["kl_se"], abs(kls[0] - kls[1]) / 2, 1e-5)
    close(metrics["optimal_tau"], tau, 1e-4)
    close([metrics["optimal_kl"], metrics["efficiency"]], [sum(kls) / 2, 1.0], 1e-4)
    close(metrics["optimal_reward"], (p[0] + 3 * (1 - p[1])) / 2, 1e-5)
    sizes = [1 / (share**2 + (1 - share) ** 2) for share in p]
    close(metrics["effective_sample_size"], sum(sizes) / 2, 1e-5)
    mean = (q[0] + 3 * (1 - q[1])) / 2  # what the reference earns
    squares = [q[0] * (1 - mean) ** 2 + (1 - q[0]) * mean**2]
    squares += [q[1] * mean**2 + (1 - q[1]) * (3 - mean) ** 2]
    deviation = math.sqrt(sum(squares) / 2)
    close(metrics["reward_deviation"], deviation, 1e-5)
    values = value(q[0], 1, 0, deviation), value(q[1], 0, 3, deviation)
    close(metrics["value_deviation"], abs(values[0] - values[1]) / 2, 1e-5)
    close(picture["reference"], [0.0, mean], 1e-5)
    close(picture["policy"], [sum(kls) / 2, metrics["optimal_reward"]], 1e-5)
    close(picture["frontier"][-1][1], (1 + 3) / 2, 1e-5)
    assert len(answers) == 2 and "kl_from_optimum" not in metrics
    other = dataclasses.replace(c, seed=1)  # draws other prompts for the standard error alone
    again = evaluation.evaluate_task(
        other, world, Coins(world, *p), Coins(world, *q), world.heldout, "heldout"
    )[0]
    assert again["optimal_reward"] == metrics["optimal_reward"]
    assert again["optimal_reward_se"] != metrics["optimal_reward_se"]


def test_dro_is_measured_against_pi_star_and_v_star_of_its_own_tau_on_its_own_scale():
    tau, scale, p, q = 0.5, [0.4, 2.0], (0.7, 0.6), (0.5, 0.25)
    c, world = settings("dro", tau=tau), world_of_coins()
    guess = torch.tensor([0.25, -1.0])
    state = state_of(Coins(world, *p), lambda ids, mask: guess[: len(ids)], scale)
    metrics, _, picture = evaluation.evaluate_task(
        c, world, state.policy, Coins(world, *q), world.heldout, "heldout", state
    )
    rewards = [[(WORTH[k][word] - 0.4) / 2.0 for word in ("good", "bad")] for k in "xy"]
    best = [tilted(share, r[0] - r[1], tau) for share, r in zip(q, rewards)]
    close(metrics["kl_from_optimum"], (kl(best[0], p[0]) + kl(best[1], p[1])) / 2, 1e-5)
    close(metrics["optimum_kl"], (kl(best[0], q[0]) + kl(best[1], q[1])) / 2, 1e-5)
    values = [value(share, *r, tau) for share, r in zip(q, rewards)]
    close(picture["optimal_value"], values, 1e-5)
    assert picture["value"] == guess.tolist()
    error = abs(0.25 - values[0]) + abs(-1.0 - values[1])
    close(metrics["value_error"], error / 2, 1e-5)
    close(metrics["value_correlation"], -1.0, 1e-6)  # of two points that change places
    sampled = evaluation.evaluate_task(
        c, world, state.policy, Coins(world, *q), world.heldout, "heldout", state, False
    )[0]
    assert sampled["optimum_kl"] > 0
    close(sampled["kl_from_optimum"], metrics["kl_from_optimum"], 0.05)
    few = dataclasses.replace(c, eval_samples=8)
    sampled = evaluation.evaluate_task(
        few, world, state.policy, Coins(world, *q), world.heldout, "heldout", state, False
    )[0]
    assert sampled["kl_from_optimum"] is None  # 16 samples amount to no 20


def test_coins_of_two_like_faces_earn_win_and_answer_as_they_must():
    c, world = settings(), world_of_coins()
    policy, ref = Coins(world, SURE, 1 - SURE), Coins(world, 1 - SURE, 1 - SURE)
    metrics, answers, _ = evaluation.evaluate_task(c, world, policy, ref, world.heldout, "heldout")
    assert (metrics["policy_reward"], metrics["reference_reward"]) == ((1 + 3) / 2, (0 + 3) / 2)
    assert metrics["best_of_8_reward"] == 3 / 2 and metrics["win_rate"] == (1 + 0.5) / 2
    assert (metrics["policy_praise"], metrics["reference_praise"]) == (1 / 2, 0)
    assert metrics["shuffled_policy_reward"] == 0  # good for y, bad for x
    assert metrics["shuffled_reference_reward"] == 3 / 2
    assert metrics["policy_length"] == 2
    assert metrics["policy_distinct"] == metrics["reference_distinct"] == 1 / c.eval_samples
    texts = [[pool.decode(world, lists[0]) for lists in row[1:]] for row in answers]
    assert texts == [[" good", " bad"], [" bad", " bad"]]


def test_samples_have_the_kl_of_their_own_side_and_an_efficiency_where_they_are_many():
    world, q = world_of_coins(), (0.5, 0.25)
    policy, ref = Coins(world, SURE, 1 - SURE), Coins(world, *q)

    def measured(N):
        c = settings(eval_samples=N)
        return evaluation.evaluate_task(c, world, policy, ref, world.heldout, "x", None, False)[0]

    few, many = measured(8), measured(64)
    close(many["kl"], (math.log(1 / 0.5) + math.log(1 / 0.75)) / 2, 1e-6)
    close(many["kl_se"], (math.log(1 / 0.5) - math.log(1 / 0.75)) / 2, 1e-6)
    assert few["effective_sample_size"] < 16 and few["efficiency"] is None  # all samples there are
    assert many["effective_sample_size"] > 64
    close(many["efficiency"], 1.0, 1e-6)


def test_policy_and_reference_draw_apart_and_every_look_draws_anew():
    c, world = settings(eval_samples=64), world_of_coins()
    model = Coins(world, 0.5, 0.5)
    answers = evaluation.evaluate_task(c, world, model, model, world.heldout, "heldout")[1]
    assert all(own != theirs for _, own, theirs in answers)
    looks = [
        evaluation.sampled_kl(c, world, model, model, world.heldout, 64, step)[0] for step in (1, 2)
    ]
    assert looks[0] != looks[1]


def test_an_efficiency_is_shown_from_0_05_nats_and_20_samples_on():
    def shown(nats=0.05, size=20.0, efficiency=0.5, enumerated=False, tau=1.0):
        best = frontier.Frontier(*[0.0] * 3, tau, *[0.0] * 3, efficiency, 0.125, size)
        metrics = evaluation.optimum_metrics(torch.tensor([nats] * 2), best, enumerated)
        return not math.isnan(metrics["efficiency"]) and metrics["efficiency_se"] == 0.125

    assert shown(0.0501) and shown(0.0501, 2.0, enumerated=True)
    assert not shown(0.0499) and not shown(0.0499, enumerated=True)
    assert not shown(1.0, 19.9) and not shown(1.0, efficiency=math.nan)
    assert shown(1.0, 1.0, tau=0.0) and not shown(0.04, 1.0, tau=0.0)  # beyond any optimum's KL


# ------------------------------------------------------------------------------------ while it runs


def test_a_quick_look_is_at_the_policy_on_held_out_prompts():
    world, q, tau = world_of_coins(), (0.5, 0.25), 0.5
    world.rounds = [asked(world, "y")]
    policy, ref = Coins(world, SURE, 1 - SURE), Coins(world, *q)
    metrics = evaluation.quick_evaluation(settings(), world, state_of(policy), ref, 1)
    close(metrics["reward"], (1 + 3) / 2)
    close(metrics["kl"], (math.log(1 / 0.5) + math.log(1 / 0.75)) / 2, 1e-6)
    # The logged lists of a file, with rewards on a scale: r - tau log-ratio of good and of bad.
    world = world_of_coins(task=False)
    both = [" good", " bad"]
    world.heldout = asked(world, "x", responses=both, rewards=[1.0, 0.0])
    world.heldout += asked(world, "y", responses=both, rewards=[0.0, 3.0])
    world.logged = asked(world, "x", responses=both, rewards=[9.0, -9.0])
    world.rounds = [world.logged]
    p = 0.8, 0.6
    state = state_of(Coins(world, *p), scale=[0.5, 2.0])
    ref = Coins(world, *q)
    metrics = evaluation.quick_evaluation(settings("dro", tau=tau), world, state, ref, 1)
    gaps = [1 / 2, -3 / 2]
    for k in range(2):
        ratios = math.log(p[k] / q[k]), math.log((1 - p[k]) / (1 - q[k]))
        gaps[k] -= tau * (ratios[0] - ratios[1])
    expected = math.sqrt((gaps[0] ** 2 / 4 + gaps[1] ** 2 / 4) / 2)
    close(metrics["residual/within_prompt"], expected, 1e-5)
    assert "reward" not in metrics


def test_a_quick_look_is_spread_over_all_held_out_prompts(monkeypatch):
    seen, world = [], world_of_coins()
    world.heldout = [dataclasses.replace(world.heldout[0], prompt=k) for k in range(96)]

    def looked(c, world, policy, reference, examples, M, name):
        seen.extend(e.prompt for e in examples)
        return [[[1]]] * len(examples), torch.zeros(len(examples), 1)

    monkeypatch.setattr(evaluation, "sampled_kl", looked)
    monkeypatch.setattr(evaluation, "reward_list", lambda world, prompt, ids: [0.0])
    evaluation.quick_evaluation(settings(), world, state_of(None), None, 1)
    assert seen == list(range(0, 96, 3))


# --------------------------------------------------------------------------------------- at the end


def test_a_task_is_measured_on_each_of_its_splits(monkeypatch, tmp_path):
    world, seen = world_of_coins(), {}
    world.ood, world.train = asked(world, *"yy"), asked(world, *"xxxy")
    world.heldout = [dataclasses.replace(world.heldout[0], prompt=k) for k in range(9)]

    def measured(c, world, policy, reference, examples, split, state=None):
        seen[split] = examples, state
        return {"kl": float(len(examples))}, [], {}

    monkeypatch.setattr(evaluation, "evaluate_task", measured)
    c = settings(eval_prompts=4)
    state = state_of(Coins(world, 0.5, 0.5))
    metrics, _ = evaluation.evaluate(dataclasses.replace(c, out=str(tmp_path)), world, state, None)
    assert metrics == {"kl": 4.0, "ood_kl": 2.0, "train_kl": 4.0}
    assert seen["ood"][0] == world.ood and all(kept is state for _, kept in seen.values())
    assert sorted(e.prompt for e in seen["train"][0]) == ["x", "x", "x", "y"]
    some = [e.prompt for e in seen["heldout"][0]]
    assert len(set(some)) == 4 and sorted(some) != [0, 1, 2, 3]  # any of them, not the first


def test_the_held_out_lists_of_a_file_by_hand(tmp_path):
    world, both = world_of_coins(task=False), [" good", " bad"]
    world.heldout = asked(world, "x", responses=both, rewards=[1.0, 0.0])
    world.heldout += asked(world, "y", responses=both, rewards=[0.0, 3.0])
    world.heldout += asked(world, "x", responses=[" good"], rewards=[7.0])  # compares nothing
    p, q = (SURE, 1 - SURE), (0.5, 0.25)
    c = dataclasses.replace(settings("dro"), out=str(tmp_path))
    state = state_of(Coins(world, *p))
    metrics, answers = evaluation.evaluate(c, world, state, Coins(world, *q))
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["x", "y"]
    close(rows[1]["reference_sum"], [math.log(0.25), math.log(0.75)], 1e-6)
    close(rows[1]["reference_mean"], [math.log(0.25) / 2, math.log(0.75) / 2], 1e-6)
    close(rows[0]["policy_ratio"][0], math.log(1 / 0.5), 1e-6)
    assert rows[0]["longest"] == [len(" good"), len(" bad")]
    kls = [math.log(1 / 0.5)] * 2 + [math.log(1 / 0.75)]  # x stands there twice
    mean = sum(kls) / 3
    close(metrics["kl"], mean, 1e-6)
    close(metrics["kl_se"], math.sqrt(sum((k - mean) ** 2 for k in kls) / 2) / math.sqrt(3), 1e-6)
    sure = Coins(world, 1 - SURE, 1 - SURE)
    answers = evaluation.evaluate(c, world, state, sure)[1]
    ids = {word: [world.enc.encode_single_token(f" {word}")] for word in ("good", "bad")}
    for e, own, theirs in answers:
        assert {row[0] for row in own} == set(ids["good" if e.prompt == "x" else "bad"])
        assert {row[0] for row in theirs} == set(ids["bad"])


def test_lists_of_unlike_lengths_weigh_as_they_should():
    rows = [
        {"prompt": "x", "rewards": [2.0, 0.0, 0.0, 0.0], "sum": [4, 3, 2, 1], "longest": [1] * 4},
        {"prompt": "y", "rewards": [1.0, 3.0], "sum": [2, 1], "longest": [1, 2]},
        {"prompt": "z", "rewards": [1.0, 1.0], "sum": [2, 1], "longest": [1, 1]},
    ]
    metrics = evaluation.list_metrics(rows)
    assert metrics["mean_reward"] == (2 / 4 + 2 + 1) / 3  # a list counts once
    assert metrics["best_reward"] == (2 + 3 + 1) / 3
    assert metrics["pair_accuracy_sum"] == (3 + 0) / (3 + 1)  # a pair of unlike rewards counts once
    assert metrics["longer_accuracy"] == (3 * 0.5 + 1) / (3 + 1)


def test_the_table_shows_each_split_and_says_where_the_frontier_ends():
    metrics = {name: 1.0 for name in evaluation.SUMMARY}
    metrics |= {f"ood_{name}": 2.0 for name in evaluation.SUMMARY}
    ends = {"optimal_tau": 0.5, "ood_optimal_tau": 0.0, "optimal_kl": 1.0, "ood_optimal_kl": 1.5}
    lines = evaluation.summary(metrics | ends).splitlines()
    assert lines[1].split() == ["policy_reward", "1.000", "2.000"]
    assert lines[-1].startswith(
        "new subjects: over the answers drawn no optimum needs more than 1.50 nats"
    )
    assert "held out:" not in lines[-2]


# ------------------------------------------------------------------------------------- the frontier


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("tau", [1e-3, 0.7, 300.0])
def test_tau_is_found_over_the_whole_range_and_in_any_unit_of_the_reward(tau, unit):
    shares, rewards = (0.3, 0.5, 0.2), rows([1.0, 1.0 - min(tau, 0.5), 0.0])
    ref_logps = rows(shares).log()
    weights = [q * math.exp(r / tau) for q, r in zip(shares, (rewards[0] - 1).tolist())]
    best = [w / sum(weights) for w in weights]
    nats = sum(p * math.log(p / q) for p, q in zip(best, shares) if p > 0)
    assert frontier.tau_at_kl(ref_logps, unit * rewards, nats) == pytest.approx(
        tau * unit, rel=1e-3
    )


def test_the_optimum_beside_a_policy_is_at_its_mean_kl_with_its_own_effective_sample_size():
    q, tau = 0.5, 2.0
    p = tilted(q, 1, tau), tilted(q, 2, tau)
    nats = kl(p[0], q) + kl(p[1], q)
    low, high = q, SURE
    for _ in range(60):  # the policy spends it all on the first prompt
        own = (low + high) / 2
        low, high = (low, own) if kl(own, q) > nats else (own, high)
    log_b, log_w = rows([q, q], [q, q]).log(), rows([own, 1 - own], [q, q]).log()
    f = frontier.frontier(log_b, log_w, rows([1.0, 0.0], [2.0, 0.0]), resamples=2)
    close([f.kl, f.optimal_kl], [nats / 2] * 2, 1e-6)
    close([f.tau, f.optimal_reward], [tau, (p[0] + 2 * p[1]) / 2], 1e-6)
    sizes = [1 / (share**2 + (1 - share) ** 2) for share in p]
    close(f.effective_sample_size, (sizes[0] + sizes[1]) / 2, 1e-6)
    start = (1 + 2) / 4
    close(f.efficiency, ((own + 1) / 2 - start) / (f.optimal_reward - start), 1e-6)


def test_the_bootstrap_is_over_prompts_and_of_its_own_seed():
    """Of two prompts a resample is (1, 1), (1, 2) or (2, 2), with chances 1/4, 1/2 and 1/4."""
    shares = rows([0.3, 0.5, 0.2], [0.3, 0.5, 0.2])
    log_b, log_w = shares.log(), rows([0.0, 0.0, 1.0], [0.0, 0.0, 1.0]).log()  # beyond the frontier
    best, near = (1.0, 5.0), (1.0 - 5e-4, 5.0 - 5e-4)  # a tie, but for the greedy policy
    rewards = rows([best[0], near[0], 0.5], [best[1], near[1], -1.0])
    f = frontier.frontier(log_b, log_w, rewards, resamples=4000)
    assert f.tau == 0 and f.optimal_reward == 3.0
    spread = lambda one, mixed, two: math.sqrt(
        one**2 / 4 + mixed**2 / 2 + two**2 / 4 - ((one + 2 * mixed + two) / 4) ** 2
    )
    assert f.optimal_reward_se == pytest.approx(spread(1.0, 3.0, 5.0), rel=0.04)
    start = (shares * rewards).sum(-1).tolist()
    earned = 0.5, -1.0
    gains = [(earned[k] - start[k]) / (best[k] - start[k]) for k in range(2)]
    both = (sum(earned) - sum(start)) / (sum(best) - sum(start))
    assert f.efficiency_se == pytest.approx(spread(gains[0], both, gains[1]), rel=0.04)
    seeds = [frontier.frontier(log_b, log_w, rewards, 9, seed).optimal_reward_se for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def test_a_resample_is_measured_at_its_own_kl():
    """The first prompt can gain nothing; of the second the policy is the optimum."""
    q, tau = 0.5, 2.0
    p = tilted(q, 1, tau)
    log_b = rows([q, 1 - q], [q, 1 - q]).log()
    log_w = rows([q, 1 - q], [p, 1 - p]).log()
    f = frontier.frontier(log_b, log_w, rows([0.0, 0.0], [1.0, 0.0]), resamples=4000)
    close(f.optimal_reward, p / 2, 1e-6)
    # The optimal reward of (1, 1), (1, 2), (2, 2) is 0, p / 2 and p.
    assert f.optimal_reward_se == pytest.approx(p * math.sqrt(1 / 8), rel=0.04)


@pytest.mark.parametrize("B, M", [(1, 3), (5, 7)])
def test_rounding_is_nothing_to_gain(B, M):
    for seed in range(20):  # few of them round to something above 0
        (log_b, _), (log_w, _) = problem(B, M, seed), problem(B, M, seed + 100)
        alike = torch.full_like(log_b, 0.1)
        for width in (torch.float64, torch.float32):
            b, w = log_b.to(width), log_w.to(width)
            assert math.isnan(frontier.frontier(b, w, alike, resamples=2).efficiency)


def test_a_resample_with_nothing_to_gain_has_no_say_in_the_error():
    """Two prompts, one of them without a contrast: a resample of it alone is 0 / 0."""
    log_b, rewards = rows([0.5, 0.5], [0.5, 0.5]).log(), rows([1.0, 0.0], [0.3, 0.3])
    log_w = rows([0.8, 0.2], [0.5, 0.5]).log()
    f = frontier.frontier(log_b, log_w, rewards)
    assert math.isfinite(f.efficiency) and math.isfinite(f.efficiency_se)


def test_the_curve_spans_all_kl_in_any_unit_of_the_reward():
    shares = [0.3, 0.7]
    for unit in (1e-4, 1.0, 1e4):
        nats, reward = frontier.frontier_curve(rows(shares).log(), unit * rows([1.0, 0.0]))
        close([nats[0, 0], nats[-1, 0]], [0.0, math.log(1 / 0.3)], 1e-6)
        close([reward[0, 0] / unit, reward[-1, 0] / unit], [0.3, 1.0], 1e-3)
        assert nats.diff(dim=0).max() < 0.1  # no gap that a policy could fall into


# -------------------------------------------------------------------------------------- objectives


def inputs(logps, rewards, lengths=None, ref_logps=None, mask=None, **own):
    """x of one batch, everything given by hand."""
    logps, rewards = torch.tensor(logps).requires_grad_(), torch.tensor(rewards)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else torch.tensor(mask)
    lengths = torch.ones_like(rewards).long() if lengths is None else torch.tensor(lengths)
    ref_logps = None if ref_logps is None else torch.tensor(ref_logps)
    return Inputs(logps, ref_logps, rewards, mask, lengths, **own)


def test_lires_metrics_compare_what_its_loss_compares():
    logps, lengths = [[2 * math.log(0.25), 4 * math.log(0.5)]], [[2, 4]]
    x = inputs(logps, [[1.0, 0.0]], lengths)
    own = {"temperature": 1.0, "reward_norm": "none", "sft_weight": 0.5}
    metrics = objectives.lire_metrics(settings(score="mean", **own), x)
    close(metrics["rewards/expected"], [0.25 / (0.25 + 0.5)], 1e-6)
    parts = objectives.lire_objective(settings(score="mean", **own), x)
    close(parts["loss/lire"], [-0.25 / (0.25 + 0.5)], 1e-6)
    close(parts["loss/sft"], [0.5 * -math.log(0.25)], 1e-6)  # a mean per token of the best
    assert list(parts) == ["loss/lire", "loss/sft"]
    close(objectives.lire_metrics(settings(score="sum", **own), x)["rewards/expected"], [0.5], 1e-6)


def test_a_list_has_collapsed_where_one_candidate_holds_over_99_percent():
    shares = [0.95, 0.9899, 0.9901]
    logps = [[math.log(share), math.log(1 - share)] for share in shares]
    x = inputs(logps, [[1.0, 0.0]] * 3)
    metrics = objectives.lire_metrics(settings(temperature=1.0), x)
    assert metrics["candidates/collapsed"].tolist() == [0.0, 0.0, 1.0]


def test_equal_implied_rewards_are_not_right():
    x = inputs([[-1.0, -2.0], [-1.0, -2.0]], [[1.0, 0.0], [0.0, 1.0]], ref_logps=[[-1.0, -2.0]] * 2)
    metrics = objectives.common_metrics(settings("dpo"), x)
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.0]
    assert metrics["logps/chosen"].tolist() == [-1.0, -2.0]
    assert metrics["logps/rejected"].tolist() == [-2.0, -1.0]


def test_kto_counts_the_mean_itself_and_0_itself_as_undesirable():
    """With no mismatched pair its loss is 1 - sigmoid(beta log-ratio), turned for undesirables."""
    ratio, beta = math.log(3), 1.0
    nothing = torch.zeros(0), torch.zeros(0)

    def loss(rewards, desirable):
        x = inputs([[ratio] * 3], [rewards], ref_logps=[[0.0] * 3], mismatched=nothing)
        own = {"beta": beta, "desirable": desirable}
        return objectives.kto_objective(settings("kto", **own), x)["loss"].tolist()

    good, bad = 1 - 3 / 4, 1 - 1 / 4
    assert loss([0.0, 1.0, 2.0], "mean") == pytest.approx([bad, bad, good])
    assert loss([-1.0, 0.0, 2.0], "positive") == pytest.approx([bad, bad, good])


def test_what_v_explains_leaves_its_mean_out():
    targets, values = [1.0, 3.0], [0.0, 1.0]  # residuals 1 and 2
    x = inputs([[0.0], [0.0]], [[1.0], [3.0]], ref_logps=[[0.0], [0.0]])
    x = x._replace(values=torch.tensor(values))
    metrics = objectives.dro_metrics(settings("dro", tau=1.0), x)
    variance = lambda pair: (pair[0] - pair[1]) ** 2 / 4
    close(metrics["value/explained_variance"], 1 - variance((1.0, 2.0)) / variance(targets), 1e-6)
    close(metrics["residual/rms"], math.sqrt((1 + 4) / 2), 1e-6)
    assert metrics["value/mean"].tolist() == values


def test_thumbs_need_both_kinds_and_numbers_two_values():
    c = settings("kto", data=["thumbs.jsonl"])
    assert objectives.thumbs(settings("kto"), [1.0, -1.0]) == {"desirable": "mean"}  # of a task
    assert objectives.thumbs(c, [1.0, -1.0]) == {"desirable": "positive"}
    assert objectives.thumbs(c, [1.0, 0.0]) == {"desirable": "mean"}
    for rewards, missing in (([1.0, 1.0], "undesirable"), ([-1.0, -1.0], "desirable")):
        with pytest.raises(ValueError, match=f"is {missing}"):
            objectives.thumbs(c, rewards)
    for objective in ("kto", "dro", "lire"):
        with pytest.raises(ValueError, match="every reward is 2.0: there is nothing to learn"):
            OBJECTIVES[objective].prepare(c, [2.0, 2.0])
    zeros = dataclasses.replace(c, desirable="positive")
    with pytest.raises(ValueError, match="is desirable"):
        objectives.thumbs(zeros, [0.0, -1.0])


@pytest.mark.parametrize(
    "objective, own, harmless",
    [
        ("kto", {"desirable": "positive", "reward_norm": "global"}, {"desirable": "mean"}),
        ("dro", {"share_networks": True, "value_lr": 0.1}, {"share_networks": False}),
    ],
)
def test_options_that_do_not_go_together_are_refused_and_each_alone_is_not(
    objective, own, harmless
):
    settings(objective, **{**own, **harmless})
    for name in own:
        settings(objective, **{name: own[name]})
    with pytest.raises(ConfigError, match="away$"):
        settings(objective, **own)


@pytest.mark.parametrize(
    "own",
    [
        {"steps": -1},
        {"lr": 0.0},
        {"lr": -0.1},
        {"lr": True},
        {"sft_weight": math.nan},
        {"sft_weight": math.inf},
        {"seed": 2**64},
        {"width": 30, "heads": 4},
        {"layers": 1000, "width": 1000},
        {"candidates": 1},
        {"objective": "dpo", "candidates": 1},
        {"objective": "dro", "temperature": 2.0},
        {"evolve": 1, "data": ["x.jsonl"]},
    ],
    ids=str,
)
def test_what_no_run_can_do_is_refused(own):
    with pytest.raises(ConfigError):
        settings(**own)


@pytest.mark.parametrize("objective", ["dro-p", "kto"])
def test_what_compares_a_batch_refuses_a_batch_of_one(objective):
    with pytest.raises(ConfigError, match="batch-size must be at least 2, got 1"):
        settings(objective, batch_size=1)


# ------------------------------------------------------------------------------------ the next step


def test_v_learns_from_its_own_loss_and_the_policy_from_the_list():
    c, world, state, ref = loop_state(objective="dro", evolve=1, reward_norm="none")
    made = train.make_pool(c, world, state, ref, 0)
    batch = data.make_batch(made.batch(0), world.enc.eot_token)
    logps = update.response_logps(state.policy, batch, world.allowed)
    x = update.objective_inputs(c, world, state, ref, batch, logps)
    losses = objectives.dro_objective(c, x)
    losses["loss/value"].mean().backward()
    # V is 0 yet: d loss / d bias = mean (V - r), for policy = reference.
    expected = -batch.rewards[batch.candidate_mask].mean()
    close(state.value_network.value_head.bias.grad, [expected], 1e-5)
    assert all(p.grad is None or not p.grad.any() for p in state.policy.parameters())


def test_what_has_no_gradient_does_not_move():
    c, world, state, ref = loop_state(lr=0.5)
    before = [p.detach().clone() for p in state.policy.parameters()]
    still = sum((p - p.detach()).sum() for p in state.policy.parameters())
    state.optimizer.zero_grad()
    zero = sum((p.detach() - p).sum() for p in state.policy.parameters()) + still
    update.update(state.optimizer, zero, 1, 2, 1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, state.policy.parameters()))


def test_the_log_reads_the_reference_where_the_objective_does_not():
    world, p, q = world_of_coins(), (0.8, 0.6), (0.5, 0.25)
    both = [" good", " bad"]
    examples = asked(world, "x", responses=both, rewards=[1.0, 0.0])
    examples += asked(world, "y", responses=both, rewards=[0.0, 3.0])
    batch = data.make_batch(examples, world.enc.eot_token)
    c, policy, ref = settings("lire", sft_weight=0.0), Coins(world, *p), Coins(world, *q)
    logps = update.response_logps(policy, batch, world.allowed)
    x = update.objective_inputs(c, world, state_of(policy), ref, batch, logps)
    assert x.ref_logps is None and x.lengths.tolist() == [[2, 2]] * 2
    x = update.with_reference(c, world, ref, batch, x)
    state = types.SimpleNamespace(step=7, round_index=2, pool_metrics={"lists/tied": 0.25})
    groups = [{"lr": 0.5}, {"lr": 0.25}]
    state.optimizer = types.SimpleNamespace(param_groups=groups)
    row = update.step_metrics(c, state, x, objectives.lire_objective(c, x), [3.0, 4.0])
    expected = {"step": 7, "round": 2, "learning_rate": 0.5, "grad_norm": 3.0}
    expected |= {"value/grad_norm": 4.0, "lists/tied": 0.25}
    assert {name: row[name] for name in expected} == expected
    chosen = math.log(0.8 / 0.5), math.log((1 - 0.6) / (1 - 0.25))
    rejected = math.log((1 - 0.8) / (1 - 0.5)), math.log(0.6 / 0.25)
    close(row["rewards/chosen"], sum(chosen) / 2, 1e-5)
    close(row["rewards/rejected"], sum(rejected) / 2, 1e-5)
    assert row["rewards/accuracies"] == 0.5
    close(row["logps/rejected"], (math.log(1 - 0.8) + math.log(0.6)) / 2, 1e-5)


def test_mismatched_pairs_are_scored_by_policy_and_reference():
    world, p, q = world_of_coins(), (0.8, 0.6), (0.5, 0.25)
    examples = asked(world, "x", responses=[" good", " bad"], rewards=[1.0, 0.0])
    examples += asked(world, "y", responses=[" bad"], rewards=[3.0])
    batch = data.make_batch(examples, world.enc.eot_token)
    for scores, (after_x, after_y) in zip(
        update.mismatched_logps(world, Coins(world, *p), Coins(world, *q), batch), (p, q)
    ):
        close(scores, [math.log(1 - after_x), math.log(after_y)], 1e-6)  # x bad, y good
        assert not scores.requires_grad


@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_of_any_network_is_refused_though_the_loss_is_finite(place):
    weights = [torch.nn.Parameter(torch.tensor([0.0])) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight], "peak": 1.0} for weight in weights])
    loss = (weights[place].sqrt() + weights[1 - place]).sum()  # 0, with a slope of infinity
    with pytest.raises(FloatingPointError, match="step 3: loss is 0, gradient norm .*inf"):
        update.update(optimizer, loss, 3, 9, 1.0)
    assert [weight.item() for weight in weights] == [0.0, 0.0]


def test_a_loss_that_is_not_finite_is_refused_though_its_gradient_is():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([{"params": [weight], "peak": 1.0}])
    with pytest.raises(FloatingPointError, match="loss is inf"):
        update.update(optimizer, weight.sum() + math.inf, 1, 2, 1.0)
    assert weight.item() == 1.0


# ------------------------------------------------------------------------------ the pool of a round


def test_a_round_samples_each_prompts_responses_for_that_prompt(monkeypatch):
    own = {
        "steps": 3,
        "evolve": 2,
        "batch_size": 3,
        "reference_batch": 3,
        "iterate": 2,
        "candidates": 2,
    }
    c, world, state, ref = loop_state(reference_steps=5, **own)
    said = world.enc.encode_ordinary
    calls = []

    def sampled(c, world, policy, examples, M, generator, temperature):
        calls.append((M, temperature, torch.rand(1, generator=generator).item()))
        return [[said(e.prompt)] * M for e in examples]

    monkeypatch.setattr(train, "sample_lists", sampled)
    # Rounds end at round(1.5) = 2 and at 3 steps; the reference has read 5 x 3 prompts before.
    for k, start, prompts in ((0, 15, 3), (1, 18, 2)):  # 2 x 3 / 2, and 1 x 3 / 2 rounded up
        made = train.make_pool(c, world, state, ref, k)
        visited = [e.prompt for e in made.examples]
        assert visited == world.task.prompts("train", start, prompts)
        assert [e.response_ids for e in made.examples] == [[said(p)] * 2 for p in visited]
        assert state.generated == [e.response_ids for e in made.examples]
    assert [call[:2] for call in calls] == [(2, 1.0)] * 2 and calls[0] != calls[1]


def test_policy_and_value_network_begin_as_the_reference_is_and_not_as_it_was_made():
    c, world, model = untrained(objective="dro")
    with torch.no_grad():
        model.wte.weight.mul_(1.5)
    state = train.new_state(c, world, model)
    assert same(state.policy.state_dict(), model.state_dict())
    assert same(state.value_network.backbone.state_dict(), model.state_dict())
    assert state.reference == run.digest_of(model.state_dict())


def test_a_pool_is_of_the_policy_as_it_is_and_scored_by_the_reference_as_it_was():
    c, world, state, ref = loop_state(objective="dro", evolve=2, candidates=3)

    def drawn(model, round_index):
        prompts, generator = world.rounds[round_index], pool.rng(c.seed, "pool", round_index)
        return pool.sample_lists(c, world, model, prompts, 3, generator)

    of_the_reference = drawn(ref, 0)
    with torch.no_grad():
        state.policy.wpe.weight.add_(0.5 * torch.randn(state.policy.wpe.weight.shape))
    made = train.make_pool(c, world, state, ref, 0)
    assert state.generated == drawn(state.policy, 0) != of_the_reference
    scores = pool.score_lists(c, world, ref, made.examples)
    own = pool.score_lists(c, world, state.policy, made.examples)
    assert [e.ref_logps for e in made.examples] == scores != own
    first = state.generated
    state.step = 6
    train.make_pool(c, world, state, ref, 1)
    assert state.generated == drawn(state.policy, 1) != first


@pytest.mark.parametrize("objective", ["lire", "dpo", "slic"])
def test_pools_hold_what_their_objective_reads_and_no_more(objective, capsys):
    c, world, state, ref = loop_state(objective=objective, evolve=1, candidates=5)
    made = train.make_pool(c, world, state, ref, 0)
    pairs = "pairs" in OBJECTIVES[objective].needs
    assert {len(e.response_ids) for e in made.examples} == {2 if pairs else 5}
    assert all((e.ref_logps is not None) == (objective == "dpo") for e in made.examples)
    assert "lists of 5.0 responses" in capsys.readouterr().out  # the line is of what was sampled
    assert (made.batch_size, made.seed, made.round_index) == (c.batch_size, c.seed, 0)
    c = dataclasses.replace(c, seed=5)
    assert train.make_pool(c, world, state, ref, 0).seed == 5


def test_the_pair_of_a_list_is_its_best_and_its_worst_with_their_own_rewards():
    of = lambda *rewards: data.Example("x", [1], [[k] for k in range(len(rewards))], list(rewards))
    for rewards, pair in (((2.0, 1.0, 3.0, 1.0), [2, 1]), ((4.0, 4.0, 4.0), [0, 1])):
        chosen = pool.best_and_worst(of(*rewards))
        assert chosen.response_ids == [[k] for k in pair]
        assert chosen.rewards == [rewards[k] for k in pair]


def test_the_share_of_different_candidates_and_of_ties_by_hand():
    of = lambda ids, rewards: data.Example("x", [1], [[k] for k in ids], rewards)
    lists = [of([7, 7, 8, 9], [1.0, 1.0, 2.0, 0.0]), of([7, 8], [5.0, 5.0]), of([7], [0.0])]
    metrics = pool.pool_metrics(lists)
    assert metrics == {"lists/distinct": (3 / 4 + 1 + 1) / 3, "lists/tied": 2 / 3}
    world = world_of_coins()
    for objective, said in (("lire", True), ("dro", False)):  # dro compares over prompts too
        text = pool.describe_pool(settings(objective), world, 0, lists, metrics)
        assert ("67% of its lists hold a single reward, and so teach nothing" in text) == said
        assert "best of a list 2.333" in text  # (2 + 5 + 0) / 3


def test_the_control_gives_every_round_prompts_of_its_own():
    orders = []
    for k in (0, 1):
        c, world, state, ref = loop_state(evolve=2, shuffle_prompts=True)
        world.rounds = [world.rounds[0]] * 2  # the same prompts in both
        state.generated, state.round_index = [[[0, 1], [2]]] * len(world.rounds[k]), k
        made = train.make_pool(c, world, state, ref, k)
        orders.append([e.prompt_ids for e in made.examples])
    own = [e.prompt_ids for e in world.rounds[0]]
    assert orders[0] != orders[1] and own not in orders
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(own)


def test_each_pass_has_an_order_of_its_own_and_so_has_each_round():
    examples = [data.Example(f"{i}", [1], [[2]], [0.0]) for i in range(20)]
    orders = []
    for k in (0, 1):
        made = pool.Pool(examples, k, 5, seed=0)
        for start in (0, 4):
            batches = [made.batch(index) for index in range(start, start + 4)]
            orders.append(tuple(e.prompt for batch in batches for e in batch))
    assert len(set(orders)) == 4


def test_a_deviation_is_of_n_and_a_scale_takes_the_mean_away():
    assert pool.mean_and_deviation([1.0, 1.0, 5.0, 5.0]) == [3.0, 2.0]
    assert pool.normalise([1.0, 5.0], [3.0, 2.0]) == [-1.0, 1.0]
    assert pool.normalise(torch.tensor([1.0, 5.0]), [3.0, 2.0]).tolist() == [-1.0, 1.0]


def test_worlds_of_files_hold_out_what_they_were_given(tmp_path):
    paths = [write(tmp_path, *LISTS[:40]), write(tmp_path, *LISTS[40:], name="held.jsonl")]
    own = {"data": paths[:1], "eval_data": paths[1:], "limit": 7}
    world = pool.make_world(settings(**own))
    assert [e.prompt for e in world.logged] == [row["prompt"] for row in LISTS[:7]]
    assert [e.prompt for e in world.heldout] == [row["prompt"] for row in LISTS[40:]]
    write(tmp_path, *LISTS[40:-1], name="held.jsonl")
    assert pool.make_world(settings(**own)).fingerprint != world.fingerprint
    # Of M = 2 candidates all lists are ties, whatever stands behind them.
    alike = [
        {"prompt": f"{i}", "responses": list("abc"), "rewards": [1, 1, i]} for i in range(2, 60)
    ]
    path = write(tmp_path, *alike)
    assert pool.make_world(settings(data=[path])).logged
    with pytest.raises(ConfigError, match="no list has two responses of unlike reward"):
        pool.make_world(settings(data=[path], candidates=2))


# ----------------------------------------------------------------------------------------- the loop


@pytest.fixture
def watched(monkeypatch):
    """What the loop asks for: (round, batch of the round) of every step, and its learning rates."""
    seen, rates = [], []

    class Watched(pool.Pool):
        def batch(self, index):
            seen.append((self.round_index, index))
            return super().batch(index)

    def noted(optimizer, loss, step, steps, clip):
        norms = update.update(optimizer, loss, step, steps, clip)
        rates.append(optimizer.param_groups[0]["lr"])
        return norms

    monkeypatch.setattr(train, "Pool", Watched)
    monkeypatch.setattr(train, "update", noted)
    return seen, rates


def test_every_step_has_its_batch_its_rate_and_its_row(watched, tmp_path):
    own = {"steps": 11, "eval_every": 4, "reference_steps": 1, "lr": 0.01, "candidates": 2}
    train.main(small(tmp_path / "run", **own))
    seen, rates = watched
    assert seen == [(0, k) for k in range(6)] + [(1, k) for k in range(5)]  # round(5.5) = 6
    assert rates == pytest.approx([0.01] + [0.01 * (11 - k) / 10 for k in range(1, 11)])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    log = {row["step"]: row for row in map(json.loads, lines)}
    looks = [1, 4, 8, 10, 11], [False, True, True, False, True]  # at held-out prompts
    assert (list(log), ["kl" in row for row in log.values()]) == looks
    assert [row["learning_rate"] for row in log.values()] == [rates[k - 1] for k in log]
    assert all(row["grad_norm"] > 0 for row in log.values())
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 11 and saved["round_index"] == 1


def test_a_run_that_is_asked_to_stop_keeps_the_step_it_is_in(watched, tmp_path, monkeypatch):
    lire, before = OBJECTIVES["lire"], signal.getsignal(signal.SIGINT)

    def loss(c, x):
        if len(watched[0]) == 2:  # batches were asked for
            signal.raise_signal(signal.SIGINT)
        return lire.loss(c, x)

    monkeypatch.setitem(OBJECTIVES, "lire", lire._replace(loss=loss))
    with pytest.raises(KeyboardInterrupt, match="saved after step 2"):
        train.main(small(tmp_path / "run", steps=5, eval_every=5, reference_steps=1))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2 and signal.getsignal(signal.SIGINT) is before


def test_a_resumed_run_goes_on_with_the_step_behind_its_checkpoint(watched, tmp_path):
    own = {"steps": 7, "eval_every": 3, "reference_steps": 1, "candidates": 2}
    with failing(6), pytest.raises(OSError, match="the machine is gone"):
        train.main(small(tmp_path / "run", **own))
    seen, rates = watched
    assert seen == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    before = rates[3:]
    seen.clear(), rates.clear()
    train.main(command_line(["--resume", str(tmp_path / "run")]))
    assert seen == [(0, 3), (1, 0), (1, 1), (1, 2)] and rates[: len(before)] == before
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3, 6, 7]


# ------------------------------------------------------------------------------------- the pictures


class Axes:
    """Notes what is drawn: {label or marker: points}, and the texts."""

    def __init__(self):
        self.drawn, self.texts = {}, {}

    def plot(self, first, second, *style, label="", **how):
        name = label or style[0]
        both = isinstance(first, (list, tuple))
        self.drawn[name] = list(zip(first, second)) if both else (first, second)

    def set(self, **texts):
        self.texts |= texts


def test_the_plane_has_kl_to_the_right_and_reward_upwards():
    log = [
        {"step": 1},
        {"step": 2, "kl": 0.5, "reward": 2.0},
        {"step": 4, "kl": 1.5, "reward": 3.0},
    ]
    metrics = {"kl": 1.25, "policy_reward": 3.5, "reference_reward": 1.0, "optimal_tau": 0.5}
    picture = {"frontier": [[0.0, 1.0], [2.0, 4.0]], "value": [0.5, 0.25], "optimal_value": [1, 2]}
    ax, beyond, values = Axes(), Axes(), Axes()
    figures.draw_frontier(ax, picture, log, metrics)
    assert ax.drawn["optimum"] == [(0.0, 1.0), (2.0, 4.0)]
    assert ax.drawn["policy, in training"] == [(0.0, 1.0), (0.5, 2.0), (1.5, 3.0)]
    assert ax.drawn["policy"] == (1.25, 3.5)
    assert "needs more" not in ax.texts["xlabel"]
    figures.draw_frontier(beyond, picture, log, {**metrics, "optimal_tau": 0, "optimal_kl": 2.0})
    assert "(no optimum needs more than 2.0)" in beyond.texts["xlabel"]
    figures.draw_values(values, picture)
    assert values.drawn["o"] == [(1, 0.5), (2, 0.25)] and values.drawn["V = V*"] == [(1, 1), (2, 2)]
    assert (values.texts["xlabel"], values.texts["ylabel"]) == ("V*(x)", "V(x)")


def test_a_curve_leaves_out_what_is_not_known():
    ax = Axes()
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 1}]
    figures.draw_curves(ax, "loss", log, {})
    assert list(ax.drawn.values()) == [[(1, 2.0), (4, 1)]]


def test_a_sum_of_losses_has_no_panel_where_its_parts_have(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    titles = []
    monkeypatch.setattr(
        figures, "draw_curves", lambda ax, title, log, metrics: titles.append(title)
    )
    (tmp_path / "metrics.json").write_text("{}")
    row = {"step": 1, "loss": 1.0}
    for own in ({}, {"loss/policy": 0.5, "loss/value": 0.5}):
        (tmp_path / "log.jsonl").write_text(json.dumps(row | own) + "\n")
        figures.draw(tmp_path)
    assert titles == ["loss", "DRO's losses"]


# ------------------------------------------------------------------------------------ the reference


def test_a_t5_has_the_proportions_of_t5_small_and_a_gpt_those_of_gpt2():
    c = settings(model="t5", width=24, heads=3, layers=2)
    model = reference.new_model(c, world_of_coins())
    assert (model.config.head_width, model.config.mlp_width) == (8, 48)
    gpt = reference.new_model(dataclasses.replace(c, model="gpt"), world_of_coins())
    assert (gpt.config.heads, gpt.config.context) == (3, c.max_prompt + c.max_response)


def test_the_reference_sees_every_list_once_an_epoch_and_its_loss_is_per_token(monkeypatch):
    c, world, _ = untrained(reference_steps=6, reference_batch=3)
    world.logged = list({e.prompt: e for e in world.logged}.values())[:7]
    world.logged[0].response_ids = [world.logged[0].response_ids[0] * 2]  # unlike lengths
    world.allowed = None
    batches, losses = [], []
    make, step = data.make_batch, update.update

    def noted(examples, *rest):
        batches.append([e.prompt for e in examples])
        return make(examples, *rest)

    def stepped(optimizer, loss, *rest):
        losses.append((loss.item(), *rest, optimizer.param_groups[0]["peak"]))
        return step(optimizer, loss, *rest)

    monkeypatch.setattr(reference, "make_batch", noted)
    monkeypatch.setattr(reference, "update", stepped)
    c = dataclasses.replace(c, reference_lr=1e-9, max_response=99)
    model = reference.new_model(c, world)
    reference.train_reference(c, world)
    epochs = batches[:3], batches[3:]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == sorted(e.prompt for e in world.logged)
    assert epochs[0] != epochs[1]
    assert [row[1:] for row in losses] == [(k, 6, 1.0, 1e-9) for k in range(1, 7)]
    by_prompt = dict(zip((e.prompt for e in world.logged), world.logged))
    examples = [by_prompt[prompt] for prompt in batches[0]]
    rows = pool.score_lists(c, world, model, examples)
    tokens = sum(len(ids) for e in examples for ids in e.response_ids)
    assert losses[0][0] == pytest.approx(-sum(map(sum, rows)) / tokens, rel=1e-4)


def test_a_reference_is_told_apart_by_texts_precision_and_sources(monkeypatch):
    c, world, _ = untrained()
    key = reference.cache_key(c, world)
    assert (
        reference.cache_key(c, dataclasses.replace(world, fingerprint="other"))["texts"] == "other"
    )
    # It never reads what the rounds are handed.
    assert reference.cache_key(c, dataclasses.replace(world, rounds_fingerprint="other")) == key
    assert reference.cache_key(dataclasses.replace(c, dtype="bfloat16"), world) != key
    monkeypatch.setattr(reference.inspect, "getsource", lambda module: "another version")
    changed = {k for k, v in reference.cache_key(c, world).items() if v != key[k]}
    assert changed == {f"{name}.py" for name in reference.SOURCES}


# ------------------------------------------------------------------------------ the folder of a run


def test_a_digest_tells_names_numbers_shapes_and_kinds_apart():
    contents = [
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "step": 1},
        {"a": torch.zeros(2, 3), "step": 2},
        {"a": [torch.zeros(2, 3)]},
    ]
    assert len({run.digest_of(content) for content in contents}) == len(contents)


def test_the_files_of_a_resumed_run_may_move_and_its_settings_may_not(tmp_path):
    c = settings("dro", data=["old.jsonl"], tau=0.5)
    (tmp_path / "config.json").write_text(json.dumps(vars(c)))
    resumed = command_line(["--resume", str(tmp_path), "--data", "new.jsonl"])
    assert (resumed.data, resumed.tau, resumed.out) == (["new.jsonl"], 0.5, str(tmp_path))
    with pytest.raises(ConfigError, match="tau: 0.5 there, 0.25 here"):
        command_line(["--resume", str(tmp_path), "--tau", "0.25"])


KEY = {"texts": "a", "rounds": "b"}


def stepped_run(folder):
    """(c, run, state, its world and reference) of a DRO run that has made a step."""
    c, world, state, ref = loop_state(objective="dro", evolve=2)
    c = dataclasses.replace(c, out=str(folder), resume=str(folder))
    made = train.make_pool(c, world, state, ref, 0)
    batch = data.make_batch(made.batch(0), world.enc.eot_token)
    logps = update.response_logps(state.policy, batch, world.allowed)
    x = update.objective_inputs(c, world, state, ref, batch, logps)
    loss = objectives.total(objectives.dro_objective(c, x))
    update.update(state.optimizer, loss, 1, c.steps, c.clip)
    state.step = 1
    return c, run.Run(c, KEY, 0.0), state, world, ref


def test_a_restored_state_is_the_saved_one_in_every_part(tmp_path):
    c, own, state, world, ref = stepped_run(tmp_path)
    own.save(state)
    new = train.new_state(c, world, ref)
    run.restore(new, run.load_checkpoint(c, KEY))
    assert same(new.policy.state_dict(), state.policy.state_dict())
    assert same(new.value_network.state_dict(), state.value_network.state_dict())
    old, again = state.optimizer.state_dict()["state"], new.optimizer.state_dict()["state"]
    assert old and all(same(old[k], again[k]) for k in old)
    assert not same(new.policy.state_dict(), ref.state_dict())
    plain = "reference step round_index generated reward_scale pool_metrics".split()
    assert [getattr(new, k) for k in plain] == [getattr(state, k) for k in plain]
    assert (new.step, new.round_index) == (1, 0) and new.generated and new.reward_scale


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    c, own, state, *_ = stepped_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    assert "came before the first checkpoint" in own.kept()
    own.save(state)
    assert "last good checkpoint is kept" in own.kept()
    assert run.load_checkpoint(c, KEY)["step"] == 1
    for name in KEY:
        with pytest.raises(ConfigError, match="its data have changed"):
            run.load_checkpoint(c, KEY | {name: "other"})
    with pytest.raises(ConfigError, match="another config"):
        run.load_checkpoint(dataclasses.replace(c, tau=0.7), KEY)
    state.step = c.steps + 1
    own.save(state)
    with pytest.raises(ConfigError, match=f"it is of step {c.steps + 1}"):
        run.load_checkpoint(c, KEY)
    whole = torch.load(path, weights_only=True)
    whole["step"] = 1  # a whole file, whose digest is of another one
    torch.save(whole, path)
    with pytest.raises(ConfigError, match="does not match its digest"):
        run.load_checkpoint(c, KEY)


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("write failed")])
def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch, error):
    def full(content, file):
        file.write(b"half")
        raise error

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(run.torch, "save", full)
    with pytest.raises(OSError, match="file can't be written"):
        run.save({"step": 1}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_parts_go_with_their_processes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid(), "nobody"):
        (tmp_path / f"file.{process}.part").write_text("half")
    run.remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"file.{os.getppid()}.part"]


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with run.locked(tmp_path / "run"):
        with pytest.raises(ConfigError, match="is in use"), run.locked(tmp_path / "run"):
            pass
    with run.locked(tmp_path / "run"):
        pass


def test_a_run_without_metrics_holds_its_folder_and_a_moved_one_is_the_same(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    c = dataclasses.replace(settings(), out=str(tmp_path))
    with pytest.raises(ConfigError, match="holds a run already"):
        run.check_folder(c)
    assert run.check_folder(dataclasses.replace(c, resume=str(tmp_path))) == tmp_path
    here, there = (config.run_settings(dataclasses.replace(c, out=name)) for name in ("a", "b"))
    assert here == there and config.difference(here, there) == ""
    assert config.difference({}, {"new": 1}) == "new: None there, 1 here"


def test_a_file_is_whole_elsewhere_before_it_takes_its_place(tmp_path, monkeypatch):
    seen, replace = [], run.os.replace
    path = tmp_path / "file"
    path.write_text("old")

    def noted(part, to):
        seen.append((Path(part).read_text(), path.read_text(), to))
        replace(part, to)

    monkeypatch.setattr(run.os, "replace", noted)
    run.save("new", path)
    assert seen == [("new", "old", path)] and path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_resumed_log_ends_at_its_step(tmp_path):
    row = lambda step: json.dumps({"step": step}) + "\n"
    own = run.Run(dataclasses.replace(settings(), out=str(tmp_path)), {}, 0.0)
    own.log_path.write_text("".join(map(row, (1, 4, 8, 10))))
    own.start_log(8)
    assert own.log_path.read_text() == "".join(map(row, (1, 4, 8)))


def test_laps_add_up_to_the_time_that_went_by(monkeypatch):
    times = iter([110.0, 115.0, 135.0])
    monkeypatch.setattr(run.time, "time", lambda: next(times))
    own = run.Run(settings(), {}, 100.0)
    for part in ("pool", "train", "pool"):
        own.lap(part)
    assert own.seconds == {"pool": 10.0 + 20.0, "train": 5.0}


def test_the_time_that_is_left_is_that_of_the_steps_made_here(monkeypatch, capsys):
    times = iter([0.0, 8.0])
    monkeypatch.setattr(run.time, "time", lambda: next(times))
    run.Progress("lire", 20, first=10).show(12, torch.tensor(1.0), {}, line=True)
    assert capsys.readouterr().out.rstrip().endswith(f"{8 / 2 * 8:.0f} s left")
