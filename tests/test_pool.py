"""What a run learns on: worlds from tasks and files, samples, scores, rewards, batches in order."""

import dataclasses
import math
import os

import pytest
import torch
from helpers import DATA_DIR, LISTS, SINGLES, same, small, untrained, write

import data
import model as models
import train
from harness import pool
from harness.config import ConfigError, resolve
from harness.evaluation import enumerate_responses
from objectives import OBJECTIVES

# ------------------------------------------------------------------------------------------- worlds


def test_held_out_prompts_are_never_trained_on(tmp_path, capsys):
    settings = {
        "data": [write(tmp_path, *LISTS)],
        "eval_data": [write(tmp_path, *LISTS[:7], name="held.jsonl")],
    }
    world = pool.make_world(resolve(small(tmp_path / "run", **settings)))
    assert not {e.prompt for e in world.logged} & {e.prompt for e in world.heldout}
    assert (len(world.logged), len(world.heldout)) == (len(LISTS) - 7, 7)
    assert "7 lists with a held-out prompt are left out" in capsys.readouterr().out


def test_a_task_has_prompts_to_train_on_to_hold_out_and_of_new_subjects():
    _, world, _ = untrained()
    for split, examples in (("train", world.train), ("heldout", world.heldout), ("ood", world.ood)):
        assert [e.prompt for e in examples] == world.task.prompts[split]
        assert all(e.response_ids == [] for e in examples)
    assert {e.prompt for e in world.logged} == set(world.task.prompts["train"])
    assert world.allowed.shape == (world.task.max_response, world.enc.n_vocab)


def test_the_fingerprint_tells_texts_rewards_and_seeds_apart(tmp_path):
    prints = [pool.make_world(resolve(small("x", seed=seed))).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    changed = {**LISTS[0], "rewards": [1.0, 0.25]}
    for lists in (LISTS, LISTS, [changed, *LISTS[1:]]):
        path = write(tmp_path, *lists)
        prints.append(pool.make_world(resolve(small("x", data=[path]))).fingerprint)
    assert prints[3] == prints[4] != prints[5]


@pytest.mark.parametrize(
    "rows, message",
    [
        (SINGLES, "every list here has a single response.*dro, dro-p, kto can"),
        ([LISTS[0]] * 5, "expected some of both"),
    ],
)
def test_files_that_no_list_can_be_learnt_from_are_refused(tmp_path, rows, message):
    c = resolve(small("unused", data=[write(tmp_path, *rows)]))
    with pytest.raises((data.DataError, ConfigError), match=message):
        pool.make_world(c)


def test_gpt2_explains_itself_offline(tmp_path, monkeypatch):
    def unreachable(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(data.tiktoken, "get_encoding", unreachable)
    with pytest.raises(data.DataError, match="TIKTOKEN_CACHE_DIR"):
        pool.make_world(resolve(small(tmp_path / "run", task="dialogue", tokenizer="gpt2")))


def test_gpt2_vocabulary_runs_where_it_is_at_hand(tmp_path, monkeypatch):
    folder = DATA_DIR / "tiktoken_cache"
    if not folder.exists():
        pytest.skip(f"GPT-2's vocabulary is not in {folder}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    settings = {
        "data": [write(tmp_path, *LISTS)],
        "eval_data": [write(tmp_path, *LISTS[:6], name="held.jsonl")],
        "tokenizer": "gpt2",
        "reference_steps": 1,
        "steps": 1,
        "max_response": 6,
        "width": 16,
    }
    metrics = train.main(small(tmp_path / "run", **settings))
    assert math.isfinite(metrics["kl"]) and "tokenizer.txt" not in os.listdir(tmp_path / "run")


# ---------------------------------------------------------------------------------- samples, scores


def test_random_numbers_depend_on_the_seed_and_the_names_alone():
    draw = lambda *names: torch.rand(3, generator=pool.rng(*names)).tolist()
    assert draw(0, "pool", 1) == draw(0, "pool", 1)
    assert (
        len({tuple(draw(*names)) for names in ((0, "pool", 1), (1, "pool", 1), (0, "pool"))}) == 3
    )


def test_samples_are_of_the_tasks_words_and_follow_their_generator():
    c, world, model = untrained()
    draw = lambda: pool.sample_lists(c, world, model, world.train[:5], 3, pool.rng(0, "draw"))
    lists = draw()
    assert lists == draw() and [len(responses) for responses in lists] == [3] * 5
    allowed = {tuple(ids) for ids in enumerate_responses(world)}
    assert {tuple(ids) for responses in lists for ids in responses} <= allowed


def test_lists_are_scored_in_their_own_order_each_as_if_alone():
    c, world, model = untrained()
    responses = enumerate_responses(world)
    lists = [responses[:3], responses[100:101], responses[7:9]]
    prompts = [world.train[0], world.train[40], world.train[7]]
    examples = pool.with_responses(prompts, lists)
    scores = pool.score_lists(c, world, model, examples)
    assert [len(row) for row in scores] == [3, 1, 2]
    for example, row in zip(examples, scores):
        for ids, logp in zip(example.response_ids, row):
            alone = dataclasses.replace(example, response_ids=[ids], rewards=[0.0])
            batch = data.make_batch([alone], world.enc.eot_token)
            expected = models.response_logps(model, batch, world.allowed).item()
            assert logp == pytest.approx(expected, abs=1e-5)


def test_new_responses_are_neither_rewarded_nor_scored_yet():
    _, world, _ = untrained()
    (old,) = [dataclasses.replace(world.logged[0], ref_logps=[1.0])]
    (new,) = pool.with_responses([old], [[[1, 2], [3]]])
    assert (new.prompt, new.prompt_ids) == (old.prompt, old.prompt_ids)
    assert (new.response_ids, new.rewards, new.ref_logps) == ([[1, 2], [3]], [0.0, 0.0], None)


def test_rewards_are_the_tasks_own_of_the_text_without_its_end():
    _, world, _ = untrained()
    enc = world.enc
    lists = [[*enc.encode_ordinary(text), enc.eot_token] for text in (" deep wild", " calm", "")]
    assert [pool.decode(world, ids) for ids in lists] == [" deep wild", " calm", ""]
    assert pool.reward_list(world, "What is the sea like?", lists) == [2.0, -0.5, 0.0]


# ---------------------------------------------------------------------------------------- the lists


def test_a_pool_gives_each_pass_in_an_order_of_its_own_that_no_resume_can_change():
    examples = [data.Example(f"{i}", [1] * (1 + i % 5), [[2]], [0.0]) for i in range(23)]
    batches = [pool.Pool(examples, 1, 4, seed=0).batch(n) for n in range(12)]
    for start in (0, 6):  # a pass is six batches of four, the last of three
        prompts = [e.prompt for batch in batches[start : start + 6] for e in batch]
        assert sorted(prompts) == sorted(e.prompt for e in examples)
    assert batches[:6] != batches[6:]
    again = pool.Pool(examples, 1, 4, seed=0)
    assert [again.batch(n) for n in (8, 3, 11)] == [batches[n] for n in (8, 3, 11)]
    for other in (pool.Pool(examples, 2, 4, seed=0), pool.Pool(examples, 1, 4, seed=1)):
        assert [other.batch(n) for n in range(6)] != batches[:6]


def example(rewards, responses=None):
    """A list of these rewards, by default of different responses."""
    responses = responses or [[index] for index in range(len(rewards))]
    return data.Example("x", [1], responses, rewards)


def test_different_candidates_and_tied_lists_are_counted_by_hand():
    lists = [
        example([1.0, 1.0, 1.0, 1.0], [[5, 6], [5, 6], [5], [6, 5]]),  # 3 of 4 differ
        example([0.0, 0.5], [[7], [7]]),  # the same twice
        example([-1.0, 2.0, -1.0]),  # all differ
        example([0.5, 0.5]),
    ]
    shares = pool.pool_metrics(lists)
    assert shares == {"lists/distinct": (3 / 4 + 1 / 2 + 1 + 1) / 4, "lists/tied": 2 / 4}


def describe(objective, tied, lists):
    """What is said of a pool where so many lists hold a single reward."""
    c = resolve(small("unused", objective=objective))
    examples = [example([1.0, 1.0] if index < tied else [0.0, 2.0]) for index in range(lists)]
    shares = pool.pool_metrics(examples)
    return pool.describe_pool(c, untrained()[1], 0, examples, shares).splitlines()


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if row.loss])
def test_tied_lists_are_in_the_pools_line_and_said_aloud_above_one_half(objective):
    lists = 10
    compares = bool({"lists", "pairs"} & OBJECTIVES[objective].needs)
    for tied, aloud in ((0, False), (5, False), (6, True), (10, True)):
        line, *more = describe(objective, tied, lists)
        assert line.startswith("pool 1/2: 10 lists of 2.0 responses, 100% different, ")
        assert f" {tied / lists:.0%} of the lists tied; reward 1.000, best of a list " in line
        assert bool(more) == (aloud and compares)
        for said in more:
            assert f"{tied}0% of its lists hold a single reward, and so teach nothing" in said


@pytest.mark.parametrize(
    "rewards, pair",
    [
        ([1.0, 3.0, 2.0, 0.0], [1, 3]),
        ([0.0, 3.0, 3.0, 0.0], [1, 0]),  # the first of the best, the first of the worst
        ([2.0, 1.0], [0, 1]),
        ([1.0, 2.0], [1, 0]),
        ([1.0, 1.0, 1.0], [0, 1]),  # a tie
    ],
)
def test_a_pair_is_the_first_best_and_the_first_worst_response(rewards, pair):
    chosen = pool.best_and_worst(example(rewards))
    assert chosen.response_ids == [[index] for index in pair]
    assert chosen.rewards == [rewards[index] for index in pair]


def test_rewards_are_put_on_a_scale_where_there_is_one():
    rewards = torch.tensor([1.0, 4.0])
    assert pool.normalise(rewards, (1.0, 3.0)).tolist() == [0.0, 1.0]
    assert pool.normalise(2.0, None) == 2.0 and torch.equal(pool.normalise(rewards, None), rewards)


def test_bfloat16_is_autocast_and_float32_is_left_alone():
    c, _, model = untrained()
    product = lambda c: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    for dtype in ("float32", "bfloat16"):
        with pool.precision(dataclasses.replace(c, dtype=dtype)):
            assert product(c) == getattr(torch, dtype)
    assert same(model.state_dict(), untrained()[2].state_dict())
