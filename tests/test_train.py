"""The state, the pool of a round, and the loop over them."""

import dataclasses
import math

import pytest
import torch
from helpers import LISTS, generated, log, loop_state, same, small, weights, write

import data
import model
import tasks
import train
from harness import pool, update
from harness.config import ConfigError, resolve
from harness.pool import precision, score_lists
from objectives import OBJECTIVES, best_and_worst

# -------------------------------------------------------------------------------------------- state


def test_networks_are_apart_unless_shared():
    c, world, state, reference = loop_state(objective="dro", evolve=1, lr=5e-4, value_lr=1e-2)
    policy, value = ({id(p) for p in group["params"]} for group in state.optimizer.param_groups)
    assert not policy & value and policy == {id(p) for p in state.policy.parameters()}
    assert [group["peak"] for group in state.optimizer.param_groups] == [5e-4, 1e-2]
    assert same(state.value_network.backbone.state_dict(), reference.state_dict())
    c, world, state, reference = loop_state(objective="dro", evolve=1, share_networks=True)
    (group,) = state.optimizer.param_groups
    assert state.value_network.backbone is state.policy
    assert any(parameter is state.value_network.value_head.weight for parameter in group["params"])


def test_the_policy_starts_as_a_copy_of_the_reference():
    c, world, state, reference = loop_state()
    assert state.value_network is None and same(state.policy.state_dict(), reference.state_dict())
    with torch.no_grad():
        state.policy.wte.weight.add_(1)
    assert not same(state.policy.state_dict(), reference.state_dict())


# ------------------------------------------------------------------------------------------- rounds


@pytest.mark.parametrize(
    "evolve, steps, starts",
    [(2, 12, [0, 6, 12]), (3, 10, [0, 3, 7, 10]), (0, 7, [0, 7]), (1, 7, [0, 7]), (3, 3, None)],
)
def test_rounds_share_the_steps_evenly(evolve, steps, starts):
    c, *_ = loop_state(evolve=evolve, steps=steps)
    found = pool.round_starts(c)
    assert found == (starts or found)
    lengths = [end - start for start, end in zip(found, found[1:])]
    assert (found[0], found[-1], len(lengths)) == (0, steps, max(evolve, 1))
    assert max(lengths) - min(lengths) <= 1


def test_a_round_samples_for_the_prompts_that_it_visits_and_for_no_others():
    settings = {"steps": 12, "evolve": 2, "batch_size": 4, "candidates": 3}
    c, world, state, reference = loop_state(**settings)
    made, prompts = train.make_pool(c, world, state, reference, 0), world.rounds[0]
    assert len(prompts) == 24 < len(world.task.train)  # six steps of four
    assert [e.prompt for e in made.examples] == [e.prompt for e in prompts]
    assert [len(responses) for responses in state.generated] == [3] * 24
    c, world, again, reference = loop_state(**settings)
    train.make_pool(c, world, again, reference, 0)
    assert again.generated == state.generated
    everything = len(world.task.train)  # what a round reads in a single step
    c, world, state, reference = loop_state(**settings | {"batch_size": everything})
    lists = []
    for round_index in (0, 1):
        train.make_pool(c, world, state, reference, round_index)
        lists.append(state.generated)
        assert [len(responses) for responses in state.generated] == [3] * everything
    assert world.rounds[0] == world.rounds[1] and lists[0] != lists[1]  # new samples for the same


def test_iterate_passes_over_a_smaller_pool_more_often(tmp_path):
    sizes = {}
    for iterate in (1, 2):
        train.main(small(tmp_path / f"{iterate}", iterate=iterate, steps=8, evolve=1, batch_size=4))
        lists = generated(tmp_path / f"{iterate}")
        assert all(lists)
        sizes[iterate] = len(lists)
    assert sizes == {1: 32, 2: 16}


def test_a_pool_is_rewarded_and_scored_under_the_reference():
    c, world, state, reference = loop_state(objective="dro", steps=4, evolve=1, candidates=3)
    pool = train.make_pool(c, world, state, reference, 0)
    assert (pool.round_index, state.round_index, len(pool.examples)) == (0, 0, 16)
    scores = score_lists(c, world, reference, pool.examples)
    for example, row in zip(pool.examples, scores):
        texts = [world.enc.decode(ids[:-1]) for ids in example.response_ids]
        rewards = [world.task.reward(example.prompt, text) for text in texts]
        assert example.rewards == pytest.approx(train.normalise(rewards, state.reward_scale))
        assert example.ref_logps == pytest.approx(row, abs=1e-5)
    # Nothing is overwritten.
    assert all(e.ref_logps is None and e.rewards == [] for e in world.rounds[0])


def test_a_pool_that_is_made_again_inside_its_round_is_the_same_pool():
    c, world, state, reference = loop_state(steps=4, evolve=1, candidates=3)
    first = train.make_pool(c, world, state, reference, 0)
    with torch.no_grad():
        state.policy.wpe.weight.add_(1.0)  # whatever the policy has become since
    state.step = 3
    again = train.make_pool(c, world, state, reference, 0)
    assert again.examples == first.examples


def test_without_rounds_the_pool_is_logged_lists_that_the_reference_has_not_read():
    c, world, state, reference = loop_state(evolve=0, candidates=2)
    pool = train.make_pool(c, world, state, reference, 0)
    assert state.generated is None and len(pool.examples) == 12 * 4
    records = world.task.logged(40 * 4, 12 * 4)  # behind those of the reference
    for example, logged in zip(pool.examples, data.tokenize(records, world.enc), strict=True):
        assert example.prompt == logged.prompt
        assert example.response_ids == logged.response_ids[:2]
        assert example.rewards == logged.rewards[:2]


def test_without_rounds_the_pool_of_a_file_is_its_own_lists(tmp_path):
    c, world, state, reference = loop_state(data=[write(tmp_path, *LISTS)])
    assert train.make_pool(c, world, state, reference, 0).examples == world.logged


def test_the_scale_of_the_rewards_is_that_of_the_first_pool():
    c, world, state, reference = loop_state(objective="dro", steps=8, evolve=2)
    first = train.make_pool(c, world, state, reference, 0)
    rewards = torch.tensor([reward for e in first.examples for reward in e.rewards])
    assert rewards.mean().item() == pytest.approx(0, abs=1e-6)
    assert rewards.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    mean, deviation = scale = state.reward_scale
    state.step = 4
    second = train.make_pool(c, world, state, reference, 1)
    assert state.reward_scale == scale
    for e in second.examples:
        texts = [world.enc.decode(ids[:-1]) for ids in e.response_ids]
        own = [(world.task.reward(e.prompt, text) - mean) / deviation for text in texts]
        assert e.rewards == pytest.approx(own)


def test_mean_and_deviation_by_hand():
    assert train.mean_and_deviation([1.0, 3.0]) == [2.0, 1.0]
    assert train.mean_and_deviation([0.0, 0.0, 3.0]) == pytest.approx([1.0, math.sqrt(2)])
    with pytest.raises(ConfigError, match="every reward is 2.0: there is nothing to learn"):
        train.mean_and_deviation([2.0, 2.0])


def test_shuffled_prompts_are_other_prompts():
    settings = {"task": "dialogue", "candidates": 2, "shuffle_prompts": True, "max_prompt": 32}
    c, world, state, model = loop_state(**settings, max_response=4, steps=300, evolve=1)
    state.generated, state.round_index = [[[1, 2], [3, 4]] for _ in world.rounds[0]], 0
    pool = train.make_pool(c, world, state, model, 0)
    words = lambda text: set(text.rstrip("?.").split())
    kept = sum(
        bool(words(world.enc.decode(e.prompt_ids)) & set(tasks.SENTIMENT) & words(e.prompt))
        for e in pool.examples
    )
    assert len(pool.examples) == 300 * 4 and kept < 0.1 * len(pool.examples)


def test_candidates_takes_the_first_of_a_files_lists(tmp_path, capsys):
    lists = [
        {**row, "rewards": [i % 3, 9, 9][: len(row["rewards"])]} for i, row in enumerate(LISTS)
    ]
    settings = {"objective": "dro", "candidates": 1, "data": [write(tmp_path, *lists)]}
    c, world, state, reference = loop_state(**settings)
    pool = train.make_pool(c, world, state, reference, 0)
    assert "lists of 1.0 responses" in capsys.readouterr().out
    firsts = {e.prompt: e.rewards[0] for e in world.logged}
    mean, deviation = state.reward_scale
    for e in pool.examples:
        assert e.rewards == pytest.approx([(firsts[e.prompt] - mean) / deviation])


def test_lists_of_one_response_are_left_out_where_lists_are_compared(tmp_path, capsys):
    lists = [
        {**row, "responses": row["responses"][: 1 + i % 2], "rewards": row["rewards"][: 1 + i % 2]}
        for i, row in enumerate(LISTS)
    ]
    path = write(tmp_path, *lists)
    for objective, whole in (("lire", True), ("dro", False)):
        c, world, state, reference = loop_state(objective=objective, data=[path])
        pool = train.make_pool(c, world, state, reference, 0)
        lengths = {len(e.response_ids) for e in pool.examples}
        assert lengths == ({2} if whole else {1, 2})
        assert ("lists of a single response are left out" in capsys.readouterr().out) == whole


@pytest.mark.parametrize("objective", ["dro", "dro-p", "kto"])
def test_a_first_pool_of_one_reward_ends_the_run_and_a_later_one_does_not(objective):
    c, world, state, reference = loop_state(objective=objective, evolve=2, reward_norm="none")
    world.task.reward = lambda prompt, response: 2.0
    with pytest.raises(ConfigError, match="every reward is 2.0: there is nothing to learn"):
        train.make_pool(c, world, state, reference, 0)
    state.step = 6
    assert train.make_pool(c, world, state, reference, 1).examples


# ----------------------------------------------------------------------------------------- the loop


def trained(tmp_path, monkeypatch, objective, **settings):
    """What three steps of a run score, each (who, M), in the pool and in the updates, and its log.

    Returns: pool, updates, (batch, x) of every row of the log, the rows, reference.
    """
    own = {"evolve": 1, "candidates": 5, "steps": 3, "eval_prompts": 2}
    c, world, state, reference = loop_state(
        objective=objective, out=str(tmp_path / "run"), **own, **settings
    )
    (tmp_path / "run").mkdir()
    scored, batches, seen, rows = {"pool": [], "update": []}, [], [], []
    real = model.response_logps
    names = {id(state.policy): "policy", id(reference): "reference"}

    def pool_logps(model, batch, allowed=None):
        scored["pool"].append((names[id(model)], batch.rewards.shape[1]))
        return real(model, batch, allowed)

    def policy_logps(c, world, model, batch):
        scored["update"].append((names[id(model)], batch.rewards.shape[1]))
        return update.policy_logps(c, world, model, batch)

    def metrics(c, state, x, losses, norms):
        seen.append((batches[-1], x))
        rows.append(update.step_metrics(c, state, x, losses, norms))
        return rows[-1]

    batch_of = lambda *given: batches.append(data.make_batch(*given)) or batches[-1]
    with monkeypatch.context() as patch:
        patch.setattr(pool.models, "response_logps", pool_logps)
        patch.setattr(train, "policy_logps", policy_logps)
        patch.setattr(train, "quick_evaluation", lambda *given: {})
        patch.setattr(train, "make_batch", batch_of)
        patch.setattr(train, "step_metrics", metrics)
        patch.setattr(train.Run, "save", lambda run, state: None)
        run = train.Run(c, {}, 0.0)
        train.train_policy(dataclasses.replace(c, eval_every=1), world, state, reference, run)
    return world, scored["pool"], scored["update"], seen, rows, reference


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if row.loss])
def test_what_an_objective_needs_is_scored_and_nothing_else(tmp_path, monkeypatch, objective):
    needs = OBJECTIVES[objective].needs
    _, pool, updates, seen, rows, _ = trained(tmp_path, monkeypatch, objective)
    M = 2 if "pairs" in needs else 5
    assert set(pool) == ({("reference", M)} if "reference" in needs else set())
    assert updates == [("policy", M)] * 3
    for batch, _ in seen:
        assert batch.rewards.shape == (4, M) and batch.candidate_mask.all()
    assert len(rows) == 3 and all("rewards/margins" in row for row in rows)


@pytest.mark.parametrize(
    "objective, settings",
    [
        ("lire", {}),
        ("rrhf", {}),
        ("slic", {}),
        ("pro", {}),
        ("lire", {"model": "t5"}),
        ("lire", {"dtype": "bfloat16"}),
        ("slic", {"model": "t5", "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_the_log_compares_with_the_reference_where_the_objective_does_not(
    tmp_path, monkeypatch, objective, settings
):
    assert "reference" not in OBJECTIVES[objective].needs
    world, _, _, seen, rows, reference = trained(tmp_path, monkeypatch, objective, **settings)
    for (batch, x), row in zip(seen, rows):
        with torch.no_grad(), precision(resolve(small("unused", **settings))):
            expected = model.response_logps(reference, batch, world.allowed)
        assert torch.equal(x.ref_logps, expected)
        ratios = x.logps - expected
        if "rewards/implied" in row:
            assert row["rewards/implied"] == ratios[x.mask].mean().item()
        for name, places in zip(("chosen", "rejected"), best_and_worst(x)):
            assert len(places[0]) and row[f"rewards/{name}"] == ratios[places].mean().item()
    names = ("rewards/implied", "rewards/chosen", "rewards/rejected", "rewards/margins")
    assert {rows[0][name] for name in names if name in rows[0]} == {0}
    assert rows[2]["rewards/chosen"] != 0 != rows[2]["rewards/margins"]


def test_pairs_are_of_the_lists_that_the_pool_line_counts(tmp_path, capsys):
    """The best and the worst of each list; of a tie, the first two."""
    lists = [
        {"prompt": f"{i}?", "responses": ["a", "b", "c"], "rewards": rewards}
        for i, rewards in enumerate(([0, 2, 1], [1, 0, 1], [3, 3, 3], [5, 5, 6]) * 15)
    ]
    settings = {"objective": "dpo", "data": [write(tmp_path, *lists)]}
    c, world, state, reference = loop_state(**settings)
    pool = train.make_pool(c, world, state, reference, 0)
    said = capsys.readouterr().out
    assert "lists of 3.0 responses, 100% different" in said and "reward" in said
    pairs = {(0, 2, 1): "ba", (1, 0, 1): "ab", (3, 3, 3): "ab", (5, 5, 6): "ca"}
    rewards = {e.prompt: tuple(map(int, e.rewards)) for e in world.logged}
    for e in pool.examples:
        texts = "".join(world.enc.decode(ids[:-1]).strip() for ids in e.response_ids)
        assert texts == pairs[rewards[e.prompt]] and len(e.ref_logps) == 2
    tied = sum(len(set(own)) == 1 for own in rewards.values()) / len(rewards)
    assert state.pool_metrics == {"lists/distinct": 1, "lists/tied": tied} and 0.1 < tied < 0.4


@pytest.mark.parametrize("objective", ["lire", "dro"])
def test_a_run_is_the_same_in_however_many_parts_a_batch_is_read(tmp_path, objective):
    ends = {}
    for parts in (1, 3):  # a batch of four in parts of two
        out = tmp_path / f"{parts}"
        train.main(small(out, objective=objective, grad_accum=parts, steps=8, evolve=1))
        ends[parts] = log(out)
    for one, other in zip(ends[1], ends[3], strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_sample_temperature_changes_the_pool_and_clip_the_step(tmp_path):
    ends = {}
    for name, settings in {
        "base": {},
        "pool": {"sample_temperature": 3.0},
        "clip": {"clip": 1e-9},
    }.items():
        train.main(small(tmp_path / name, steps=4, evolve=1, **settings))
        ends[name] = weights(tmp_path / name)
    assert not any(same(ends["base"], ends[name]) for name in ("pool", "clip"))


def test_the_log_has_a_row_for_the_first_every_tenth_and_every_evaluated_step(tmp_path):
    train.main(small(tmp_path / "run", steps=23, eval_every=8, evolve=2))
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 8, 10, 16, 20, 23]
    assert [row["round"] for row in rows] == [0, 0, 0, 1, 1, 1]  # the second round begins at 13
    assert [row["learning_rate"] > 0 for row in rows] == [True] * 6
