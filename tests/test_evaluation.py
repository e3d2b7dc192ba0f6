"""What is measured: against enumeration, against the optimum, and by hand."""

import dataclasses
import json
import math
import types

import pytest
import torch
from helpers import LISTS, log, loop_state, small, untrained, weights, write

import dro
import frontier
import train
from data import encoding, word_ranks
from harness import evaluation
from harness.pool import (
    reward_list,
    rng,
    sample_lists,
    score_lists,
    with_responses,
)
from harness.reference import new_model

# ------------------------------------------------------------------------------ against the optimum


def test_policy_equals_reference_before_the_first_step_in_either_precision():
    for dtype in ("float32", "bfloat16"):
        c, world, model = untrained(dtype=dtype)
        examples = world.heldout[:3]
        ratios = evaluation.sampled_kl(c, world, model, model, examples, 4, "test")[1]
        assert torch.equal(ratios, torch.zeros(3, 4))


def test_the_sampled_optimum_agrees_with_enumeration_on_tiny():
    c, world, reference = untrained(eval_samples=256, seed=3)
    policy = new_model(c, world)

    def noise(parameter, seed):
        return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))

    with torch.no_grad():
        for old in reference.parameters():
            old.add_(0.15 * noise(old, 1))
        for new, old in zip(policy.parameters(), reference.parameters()):
            new.copy_(old + 0.04 * noise(new, 2))
    exact, sampled = (
        evaluation.evaluate_task(
            c, world, policy, reference, world.heldout[:8], "x", enumerated=enumerated
        )[0]
        for enumerated in (True, False)
    )
    assert exact["kl"] > 0.2
    assert sampled["kl"] == pytest.approx(exact["kl"], abs=4 * sampled["kl_se"])
    assert sampled["optimal_reward"] == pytest.approx(exact["optimal_reward"], rel=0.1)
    assert sampled["policy_reward"] <= sampled["optimal_reward"] + 0.1


def test_efficiency_is_one_for_the_optimum_and_null_where_it_means_nothing():
    c, world, model = untrained()
    metrics = evaluation.evaluate_task(c, world, model, model, world.heldout[:4], "x")[0]
    assert metrics["kl"] == pytest.approx(0, abs=1e-9) and metrics["efficiency"] is None
    responses = evaluation.enumerate_responses(world)
    examples = with_responses(world.heldout[:1], [responses])
    ref_logps = torch.tensor(score_lists(c, world, model, examples), dtype=torch.float64)
    assert ref_logps.logsumexp(-1).item() == pytest.approx(0, abs=1e-6)
    rewards = evaluation.reward_tensor(world, examples, [responses])
    optimum = dro.optimal_logps(ref_logps, rewards, 0.4)
    assert frontier.frontier(ref_logps, optimum, rewards).efficiency == pytest.approx(1)


def test_the_probabilities_of_tiny_sum_to_one_for_reference_and_policy(finished):
    folder, _ = finished
    c, world, model = untrained()
    responses = evaluation.enumerate_responses(world)
    assert len(responses) == 8 + 8**2 + 8**3 == len(set(map(tuple, responses)))
    examples = with_responses(world.heldout[:3], [responses] * 3)
    for state in (torch.load(folder / "reference.pt", weights_only=True), weights(folder)):
        model.load_state_dict(state)
        logps = torch.tensor(score_lists(c, world, model, examples)).double()
        assert (logps.exp().sum(-1) - 1).abs().max() < 1e-6


def test_rewards_that_are_all_alike_are_measured_without_a_nan(tmp_path):
    """A reference that has learnt nothing earns nothing in dialogue; LIRE's run still ends."""
    settings = {"task": "dialogue", "reference_steps": 1, "steps": 1, "evolve": 1}
    metrics = train.main(small(tmp_path / "run", **settings, eval_prompts=2, candidates=2))
    assert metrics["value_deviation"] == 0 and metrics["efficiency"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.json").read_text()


def test_rewards_of_samples_by_hand():
    policy = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    metrics = evaluation.reward_metrics(policy, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    assert (metrics["policy_reward"], metrics["reference_reward"]) == (1.0, 1.0)
    assert metrics["win_rate"] == (1 + 1 + 0.5 + 0 + 0.5 + 0 + 0.5 + 0) / 8
    assert math.isnan(metrics["best_of_8_reward"])  # of two samples there is no best of eight
    seventeen = torch.arange(17.0)[None]
    best = evaluation.reward_metrics(seventeen, seventeen)["best_of_8_reward"]
    assert best == (7 + 15) / 2  # two groups of eight, the seventeenth is left out


def test_answers_by_hand():
    _, world, _ = untrained()
    enc = world.enc
    examples = [e for e in world.heldout if {"sea", "lake"} & set(e.prompt.rstrip("?.").split())]
    ids = lambda text: [*enc.encode_ordinary(text), enc.eot_token]
    lists = [[ids(" wild"), ids(" wild")], [ids(" calm cold"), ids("")]]
    metrics = evaluation.answer_metrics(world, examples, lists, "policy")
    assert metrics["policy_length"] == (2 + 2 + 3 + 1) / 4
    assert metrics["policy_distinct"] == 3 / 4
    # A wild sea and a calm, cold lake earn 1, 1 and 2; the other way round nothing fits.
    own = [reward_list(world, e.prompt, row) for e, row in zip(examples, lists)]
    assert own == [[1.0, 1.0], [2.0, 0.0]]
    assert metrics["shuffled_policy_reward"] == (-0.5 - 0.5 - 1.0 + 0.0) / 4


def test_a_prompt_alone_has_no_standard_error():
    assert math.isnan(evaluation.standard_error(torch.tensor([1.0])))
    error = evaluation.standard_error(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert error == pytest.approx(math.sqrt((9 + 1 + 1 + 9) / 3) / math.sqrt(4))


def test_pi_star_and_v_star_are_those_of_the_objectives_own_strength():
    c, world, state, reference = loop_state(objective="dro", evolve=1, tau=0.5)
    state.reward_scale = [0.2, 0.8]
    examples = world.heldout[:4]
    metrics, _, picture = evaluation.evaluate_task(
        c, world, state.policy, reference, examples, "x", state
    )
    responses = evaluation.enumerate_responses(world)
    pool = with_responses(examples, [responses] * 4)
    ref_logps = torch.tensor(score_lists(c, world, reference, pool)).double()
    rewards = (evaluation.reward_tensor(world, pool, [responses] * 4) - 0.2) / 0.8
    optimum, values = (f(ref_logps, rewards, 0.5) for f in (dro.optimal_logps, dro.optimal_value))
    kl = dro.kl_divergence(optimum, ref_logps).mean().item()
    assert metrics["kl_from_optimum"] == pytest.approx(kl, rel=1e-5)
    with torch.no_grad():
        state.policy.wpe.weight.add_(0.2 * torch.randn(state.policy.wpe.weight.shape))
    c = dataclasses.replace(c, eval_samples=400, tau=1.0)
    exact, sampled = (
        evaluation.evaluate_task(
            c, world, state.policy, reference, examples, "x", state, enumerated=enumerated
        )[0]["kl_from_optimum"]
        for enumerated in (True, False)
    )
    assert exact > 0.1 and sampled == pytest.approx(exact, rel=0.25)
    assert metrics["optimum_kl"] == pytest.approx(kl, rel=1e-5) and kl > 0.1
    assert picture["optimal_value"] == pytest.approx(values.tolist())
    error = (torch.tensor(picture["value"]) - values).abs().mean().item()
    assert metrics["value_error"] == pytest.approx(error)
    lire = evaluation.evaluate_task(
        dataclasses.replace(c, objective="lire"),
        world,
        state.policy,
        reference,
        examples,
        "x",
        state,
    )[0]
    assert "kl_from_optimum" not in lire and "value_error" not in lire


@pytest.mark.parametrize(
    "policy, tau, said",
    [
        # KL 1.16 nats, where the best response alone costs log 2.
        ((0.05, 0.05, 0.9), 0, True),
        ((0.7, 0.2, 0.1), None, False),  # below the end
        ((0.5, 0.3, 0.2), None, False),  # the reference has no efficiency
    ],
)
def test_efficiency_beyond_the_frontiers_end_is_said_under_the_table(policy, tau, said):
    log_b, log_w = (torch.tensor([row] * 2).double().log() for row in ((0.5, 0.3, 0.2), policy))
    rewards = torch.tensor([[1.0, 0.0, -1.0]] * 2).double()
    best = frontier.frontier(log_b, log_w, rewards)
    metrics = evaluation.optimum_metrics(dro.kl_divergence(log_w, log_b), best, True)
    metrics |= dict.fromkeys(set(evaluation.SUMMARY) - set(metrics), 0.5)
    metrics = evaluation.finite(metrics)
    assert tau is None or metrics["optimal_tau"] == tau
    both = metrics | {f"ood_{name}": value for name, value in metrics.items()}
    last = (
        "over the answers drawn no optimum needs more than 0.69 nats; the efficiency is against "
        "the best at that KL"
    )
    lines = evaluation.summary(both).splitlines()
    assert lines[-2:] == [f"held out: {last}", f"new subjects: {last}"] or not said
    assert ("no optimum needs" in evaluation.summary(both)) == said
    assert math.log(2) == pytest.approx(0.69, abs=0.005)


# -------------------------------------------------------------------------------------------- files


def test_list_metrics_count_ties_half_and_name_every_score():
    scores = {"good": [3, 1, 2], "bad": [1, 3, 2], "flat": [0, 0, 0], "longest": [9, 8, 7]}
    metrics = evaluation.list_metrics([{"prompt": "x", "rewards": [3.0, 1.0, 2.0], **scores}])
    accuracies = [metrics[f"pair_accuracy_{name}"] for name in ("good", "bad", "flat")]
    assert accuracies == [1, 0, 0.5] and metrics["longer_accuracy"] == 2 / 3
    top = [metrics[f"top1_reward_{name}"] for name in ("good", "bad", "flat")]
    assert top == [3, 1, 2] and (metrics["mean_reward"], metrics["best_reward"]) == (2, 3)


def test_ties_of_a_score_give_the_mean_reward_of_the_tied():
    assert evaluation.list_outcome([1.0, 1.0, 0.0], [4.0, 2.0, 9.0]) == (3.0, 0.5, 3)


def test_lists_are_scored_by_sums_means_ratios_and_lengths(tmp_path, capsys):
    c, world, policy = untrained(data=[write(tmp_path, *LISTS)])
    reference = new_model(dataclasses.replace(c, seed=1), world)
    rows = evaluation.evaluate_lists(c, world, policy, reference)
    assert [row["prompt"] for row in rows] == [e.prompt for e in world.heldout]
    logps, ref_logps = (
        score_lists(c, world, model, world.heldout) for model in (policy, reference)
    )
    for row, e, new, old in zip(rows, world.heldout, logps, ref_logps):
        lengths = [len(ids) for ids in e.response_ids]
        assert row["rewards"] == e.rewards and row["policy_sum"] == new
        assert row["reference_sum"] == old and row["policy_sum"] != row["reference_sum"]
        for who, sums in (("policy", new), ("reference", old)):
            assert row[f"{who}_mean"] == [s / length for s, length in zip(sums, lengths)]
        assert row["policy_ratio"] == [s - t for s, t in zip(new, old)]
        texts = next(r["responses"] for r in LISTS if r["prompt"] == e.prompt)
        assert row["longest"] == [len(" " + text) for text in texts]


# ------------------------------------------------------------------------------------ while it runs


def test_the_residual_within_prompts_is_that_of_the_samples():
    c, world, state, reference = loop_state(objective="dro", evolve=1, tau=0.5)
    state.reward_scale = [0.2, 0.8]
    # Policy = reference: what is left of the residual is the reward's deviation.
    metrics = evaluation.quick_evaluation(c, world, state, reference, 1)
    examples, generator = world.heldout[:32], rng(c.seed, "quick", 1)
    lists = sample_lists(c, world, reference, examples, 8, generator)
    rewards = evaluation.reward_tensor(world, examples, lists).float()
    expected = (rewards / 0.8).var(-1, correction=0).mean().sqrt().item()
    assert metrics["residual/within_prompt"] == pytest.approx(expected, rel=1e-5)
    assert metrics["reward"] == pytest.approx(rewards.mean().item()) and metrics["kl"] == 0


def test_files_have_a_residual_of_their_held_out_lists_and_no_reward(tmp_path):
    settings = {"objective": "dro", "data": [write(tmp_path, *LISTS)], "max_response": 16}
    c, world, state, reference = loop_state(**settings)
    metrics = evaluation.quick_evaluation(c, world, state, reference, 1)
    # Policy = reference again, and the rewards are on no scale.
    variances = [torch.tensor(e.rewards).var(correction=0) for e in world.heldout]
    expected = torch.stack(variances).mean().sqrt().item()
    assert metrics["residual/within_prompt"] == pytest.approx(expected, rel=1e-5)
    assert "reward" not in metrics
    lire = dataclasses.replace(c, objective="lire")
    assert set(evaluation.quick_evaluation(lire, world, state, reference, 1)) == {"kl"}


# --------------------------------------------------------------------------------------- at the end


def test_answers_stand_side_by_side_with_their_rewards():
    _, world, _ = untrained()
    enc, example = world.enc, world.heldout[0]
    good, bad = ([*enc.encode_ordinary(" " + world.task.words[k]), enc.eot_token] for k in (1, 0))
    text = evaluation.side_by_side(world, [(example, [good, good], [bad])], prompts=1, each=1)
    rewards = reward_list(world, example.prompt, [bad, good])
    expected = [example.prompt] + [
        f"  {who:9} {reward:6.2f}  {word}"
        for who, reward, word in zip(("reference", "policy"), rewards, ("calm", "deep"))
    ]
    assert text.splitlines() == expected
    alone = types.SimpleNamespace(enc=enc, task=None)
    assert "0.50" not in evaluation.side_by_side(alone, [(example, [good], [bad])])


def test_a_long_prompt_is_shortened_where_answers_are_printed():
    _, world, _ = untrained()
    for prompt in ("long " * 1000, "some\nlines", "x" * 300, "x" * 301):
        example = dataclasses.replace(world.heldout[0], prompt=prompt)
        alone = types.SimpleNamespace(enc=world.enc, task=None)
        text = evaluation.side_by_side(alone, [(example, [[1]], [[1]])])
        shown = text.partition("\n  reference")[0]
        assert (shown == prompt) == (len(prompt) <= 300)
        assert len(shown) <= 300 and shown[:9] == prompt[:9]


def test_control_characters_of_an_answer_are_not_shown():
    _, world, _ = untrained()
    alone = types.SimpleNamespace(enc=encoding(word_ranks([])), task=None)
    answer = alone.enc.encode_ordinary("\x1b[31mä\0 b\nc\x7f")
    text = evaluation.side_by_side(alone, [(world.heldout[0], [answer], [])])
    assert text.endswith("  policy      \ufffd[31mä\ufffd b c\ufffd")


def test_single_responses_have_no_table_of_lists():
    assert evaluation.summary({"kl": 0.5}) == "kl 0.500"
    lists = {"top1_reward_policy_sum": 1.0, "pair_accuracy_policy_sum": 0.5, "kl": 0.5}
    assert len(evaluation.summary(lists).splitlines()) == 3


def test_the_curves_hold_a_look_at_held_out_prompts_at_every_evaluation(finished):
    rows = log(finished[0])
    assert [row["step"] for row in rows if "kl" in row] == [4, 8, 12]
    assert all("reward" in row for row in rows if "kl" in row)
    assert json.loads((finished[0] / "frontier.json").read_text())["reference"][0] == 0
