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
from harness.config import Config, ConfigError, resolve
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
    settings["eval_data"] = settings["data"]
    with pytest.raises(data.DataError, match="every prompt of --data is held out, in --eval-data"):
        pool.make_world(resolve(small(tmp_path / "run", **settings)))


def asked(examples):
    """Their prompts."""
    return [e.prompt for e in examples]


def test_a_task_has_prompts_to_train_on_to_hold_out_and_of_new_subjects():
    _, world, _ = untrained()
    task = world.task
    assert asked(world.heldout) == task.heldout and asked(world.ood) == task.ood
    assert asked(world.logged) == task.prompts("train", 0, 40 * 4)
    assert [asked(prompts) for prompts in world.rounds] == [
        task.prompts("train", 160, 24),
        task.prompts("train", 184, 24),
    ]
    for examples in (world.heldout, world.ood, *world.rounds):
        assert all(e.response_ids == e.rewards == [] for e in examples)
    assert world.logged == data.tokenize(task.logged(0, 160), world.enc)
    assert world.allowed.shape == (task.max_response, world.enc.n_vocab)


def test_a_default_run_asks_for_no_prompt_twice():
    c = resolve(Config(device="cpu", out="unused"))
    world = pool.make_world(c)
    read, rounds = asked(world.logged), [asked(prompts) for prompts in world.rounds]
    assert len(read) == c.reference_steps * c.reference_batch > 1000
    assert list(map(len, rounds)) == [c.steps * c.batch_size // c.evolve] * c.evolve
    for prompts in rounds:
        assert len(set(prompts)) == len(prompts) and not set(prompts) & set(read)
    every = read + sum(rounds, [])
    assert len(set(every)) == len(every) and every == world.task.prompts("train", 0, len(every))
    assert not set(every) & {*asked(world.heldout), *asked(world.ood)}


@pytest.mark.parametrize(
    "settings, size, expected",
    [
        ({}, 1000, [(160, 24), (184, 24)]),
        ({"evolve": 1}, 1000, [(160, 48)]),
        ({"evolve": 3, "steps": 10, "batch_size": 3}, 1000, [(160, 9), (169, 12), (181, 9)]),
        ({"iterate": 2}, 1000, [(160, 12), (172, 12)]),
        ({"iterate": 5}, 1000, [(160, 5), (165, 5)]),  # 24 / 5, rounded up
        ({}, 20, [(160, 20), (184, 20)]),  # no more than there are
        ({"iterate": 2}, 20, [(160, 12), (172, 12)]),
        ({"objective": "sft"}, 1000, []),
    ],
    ids=str,
)
def test_rounds_begin_behind_the_references_prompts_and_share_none(settings, size, expected):
    c = resolve(small("unused", **settings))
    assert pool.round_prompts(c, 160, size) == expected


def test_iterate_halves_the_prompts_of_a_round():
    whole, half = (untrained(task="dialogue", iterate=n)[1].rounds for n in (1, 2))
    assert [len(prompts) for prompts in whole] == [24, 24]
    assert [len(prompts) for prompts in half] == [12, 12]
    assert sum(map(asked, half), []) == asked(whole[0])  # and the next round reads on


def test_a_round_of_tiny_has_no_more_prompts_than_there_are():
    _, world, _ = untrained(batch_size=32)  # six steps of 32
    for prompts in world.rounds:
        assert sorted(asked(prompts)) == sorted(world.task.train) and len(prompts) == 60
    (lists,) = untrained(batch_size=32, evolve=0)[1].rounds
    assert sorted(asked(lists)) == sorted(world.task.train)


@pytest.mark.parametrize("task", ["dialogue", "tiny"])
def test_without_rounds_a_task_hands_out_logged_lists_that_the_reference_never_read(task):
    _, world, _ = untrained(task=task, evolve=0)
    assert len(world.logged) == 160 and [len(lists) for lists in world.rounds] == [48]
    assert world.rounds[0] == data.tokenize(world.task.logged(160, 48), world.enc)
    key = lambda logged: (logged.prompt, str(logged.response_ids))
    assert not set(map(key, world.rounds[0])) & set(map(key, world.logged))
    if task == "dialogue":
        assert not set(asked(world.rounds[0])) & set(asked(world.logged))


def test_files_are_their_own_round_and_a_task_has_none_where_nothing_is_trained(tmp_path):
    _, world, _ = untrained(data=[write(tmp_path, *LISTS)])
    assert world.rounds == [world.logged]
    _, world, _ = untrained(objective="sft")
    assert world.rounds == [] and len(world.logged) == 160


def test_the_fingerprint_of_the_rounds_is_of_what_they_are_handed(tmp_path):
    def prints(**settings):
        world = pool.make_world(resolve(small("unused", **settings)))
        return world.fingerprint, world.rounds_fingerprint

    whole = prints()
    assert prints() == whole and prints(lr=0.1) == whole
    for change in ({"steps": 13}, {"evolve": 3}, {"iterate": 2}, {"evolve": 0}):
        other = prints(**change)
        assert other[0] == whole[0] and other[1] != whole[1], change
    # A seed draws other answers to the same prompts.
    assert prints(seed=1)[0] != whole[0] and prints(seed=1)[1] == whole[1]
    assert prints(seed=1, evolve=0)[1] != prints(evolve=0)[1]
    of_files = {prints(data=[write(tmp_path, *lists)])[1] for lists in (LISTS, LISTS, LISTS[:-1])}
    assert len(of_files) == 2


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


def news_of(tmp_path, capsys, rows, **settings):
    """What a run says of its lists before it trains."""
    settings = {"vocab_size": 400, "data": [write(tmp_path, *rows)], **settings}
    pool.make_world(resolve(small("unused", **settings)))
    return capsys.readouterr().out


def lists_of(responses, rewards, number=60):
    return [
        {"prompt": f"What is {i} like?", "responses": responses, "rewards": rewards}
        for i in range(number)
    ]


SAME = {  # a list, options of the run, what is said of it
    "text": (["Fine.", "Fine."], [1, 0], {}, "the same text"),
    "text of three": (["Fine.", "Bad.", "Fine."], [1, 0, 0], {}, "the same text"),
    "one text, one reward": (["Fine.", "Fine."], [1, 1], {}, "the same text"),
    "the space": (["46", " 46"], [1, 0], {}, "the same but for white space"),
    "truncated": (
        ["It is a fine day", "It is a fine night"],
        [1, 0],
        {"max_response": 2},
        "the same in --max-response 2 tokens",
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_lists_of_one_response_are_counted_and_more_than_half_end_the_run(tmp_path, capsys, case):
    responses, rewards, own, cause = SAME[case]
    whole = lists_of(["Ay.", "No."], [1, 0], 200)
    alike = [x | {"prompt": f"And {i}?"} for i, x in enumerate(lists_of(responses, rewards))]
    said = news_of(tmp_path, capsys, [*whole, *alike[:20]], **own)
    held = len(data.split(alike[:20])[1])
    n, total = 20 - held, len(data.split([*whole, *alike[:20]])[0])
    assert f"{n} of {total} lists hold a response twice with unlike rewards, or no other" in said
    assert f"no other: {n} {cause}\n" in said
    with pytest.raises(data.DataError, match=f"of .* lists hold a response twice.*{cause}; g") as e:
        news_of(tmp_path, capsys, [*alike, *whole[:50]], **own)
    way = "give a higher --max-response" if own else "give each response one reward, or no list"
    assert str(e.value).endswith(way)


def test_half_of_the_lists_may_be_alike_and_a_list_of_candidates_is_what_is_read(tmp_path, capsys):
    one, whole = lists_of(["Ay.", "Ay."], [1, 0], 30), lists_of(["Ay.", "No."], [1, 0], 30)
    held = [x | {"prompt": "Held?"} for x in whole[:1]]
    own = {"eval_data": [write(tmp_path, *held, name="held.jsonl")]}
    assert "30 of 60 lists" in news_of(tmp_path, capsys, [*one, *whole], **own)
    with pytest.raises(data.DataError, match="31 of 61 lists"):
        news_of(tmp_path, capsys, [*one, *one[:1], *whole], **own)
    rows = lists_of(["Ay.", "No.", "Ay."], [1, 0, 0], 30)
    assert "lists hold" not in news_of(tmp_path, capsys, rows, candidates=2, **own)


def test_a_response_that_comes_twice_with_one_reward_is_no_news_where_lists_are_not_compared(
    tmp_path, capsys
):
    rows = [*SINGLES, *SINGLES]
    assert "hold a response" not in news_of(tmp_path, capsys, rows, objective="dro")
    flipped = [row | {"reward": 1 - row["reward"]} for row in SINGLES]
    with pytest.raises(data.DataError, match="the same text; give each response one reward"):
        news_of(tmp_path, capsys, [*SINGLES, *flipped], objective="dro")


@pytest.mark.parametrize(
    "rewards, said",
    [
        ([0.0001, 0.0], "differ so little in most lists (their range is 0.0001 in the middle one)"),
        ([0.009, 0.0], "their softmax is flat"),
        ([0.011, 0.0], ""),
        ([4.5, 0.0], ""),
        ([4.7, 0.0], "differ so much in most lists (their range is 4.7 in the middle one)"),
        ([900.0, 0.0], "their softmax is one-hot"),
        ([4.7, 4.7], ""),
    ],
)
def test_rewards_that_a_softmax_makes_flat_or_one_hot_are_said(tmp_path, capsys, rewards, said):
    rows = lists_of(["Ay.", "No."], rewards)
    if rewards[0] == rewards[1]:
        rows[0] = rows[0] | {"rewards": [1, 0]}
    out = news_of(tmp_path, capsys, rows)
    assert said in out and ("--reward-norm zscore puts every list" in out) == bool(said)
    for other in ({"reward_norm": "zscore"}, {"objective": "dpo"}):
        assert "their softmax" not in news_of(tmp_path, capsys, rows, **other)


def test_few_prompts_in_many_lists_say_why_nothing_is_held_out(tmp_path):
    rows = [lists_of(["Ay.", "No."], [1, 0], 5)[i % 5] for i in range(80)]
    with pytest.raises(data.DataError, match="80 lists to train on and 0 held out.* of 5 prompts"):
        pool.make_world(resolve(small("unused", data=[write(tmp_path, *rows)])))


def test_files_are_read_in_the_format_and_with_the_threshold_that_are_asked_for(tmp_path):
    rows = [row | {"votes": i} for i, row in enumerate(SINGLES)]
    held = [row | {"prompt": "Held?"} for row in rows[2:4]]
    files = {
        "data": [write(tmp_path, *rows)],
        "eval_data": [write(tmp_path, *held, name="h.jsonl")],
    }
    world = untrained(objective="dro", format="single:votes", **files)[1]
    assert [e.rewards for e in world.logged] == [[float(i)] for i in range(60)]
    assert [e.rewards for e in world.heldout] == [[2.0, 3.0]]
    thumbs = [{"prompt": r["prompt"], "completion": "x", "label": r["votes"]} for r in rows]
    held = [row | {"prompt": "Held?"} for row in thumbs[:2]]
    files = {
        "data": [write(tmp_path, *thumbs)],
        "eval_data": [write(tmp_path, *held, name="h.jsonl")],
    }
    with pytest.raises(data.DataError, match="h?.jsonl:3: the label is 2, expected"):
        untrained(objective="kto", **files)
    world = untrained(objective="kto", threshold=0.5, **files)[1]
    assert [e.rewards[0] for e in world.logged[:3]] == [-1.0, 1.0, 1.0]
    assert world.heldout[0].rewards == [-1.0, 1.0]


def test_a_run_of_kto_says_once_which_weight_its_paper_suggests(tmp_path, capsys):
    quick = {"steps": 1, "reference_steps": 1}
    rows = [
        {"prompt": f"What is {i} like?", "completion": f"Fine {i % 7}.", "label": i % 21 > 0}
        for i in range(168)
    ]
    train.main(small(tmp_path / "run", objective="kto", data=[write(tmp_path, *rows)], **quick))
    assert capsys.readouterr().out.count("KTO's paper suggests a --desirable-weight") == 1


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
    draw = lambda: pool.sample_lists(c, world, model, world.rounds[0][:5], 3, pool.rng(0, "draw"))
    lists = draw()
    assert lists == draw() and [len(responses) for responses in lists] == [3] * 5
    allowed = {tuple(ids) for ids in enumerate_responses(world)}
    assert {tuple(ids) for responses in lists for ids in responses} <= allowed


def test_lists_are_scored_in_their_own_order_each_as_if_alone():
    c, world, model = untrained()
    responses = enumerate_responses(world)
    lists = [responses[:3], responses[100:101], responses[7:9]]
    prompts = [world.rounds[0][index] for index in (0, 20, 7)]
    examples = pool.with_responses(prompts, lists)
    scores = pool.score_lists(c, world, model, examples)
    assert [len(row) for row in scores] == [3, 1, 2]
    for example, row in zip(examples, scores):
        for ids, logp in zip(example.response_ids, row):
            alone = dataclasses.replace(example, response_ids=[ids], rewards=[0.0])
            batch = data.make_batch([alone], world.enc.eot_token)
            expected = models.response_logps(model, batch, world.allowed).item()
            assert logp == pytest.approx(expected, abs=1e-5)


def test_a_response_that_stands_in_a_list_more_than_once_is_scored_once(monkeypatch):
    c, world, model = untrained()
    one, two, three = (enumerate_responses(world)[k] for k in (3, 90, 200))
    lists = [[one, two, one, three, one], [three], [two, two], [one, three, two]]
    lists.insert(1, [])  # nothing to score
    examples = pool.with_responses(world.rounds[0][:5], lists)
    scored, real = [], models.response_logps

    def noted(model, batch, allowed):
        for k, m in batch.candidate_mask.nonzero().tolist():
            prompt = batch.prompt_ids[k][batch.prompt_mask[k]]
            response = batch.response_ids[k, m][batch.response_mask[k, m]]
            scored.append((prompt.tolist(), response.tolist()))
        return real(model, batch, allowed)

    with monkeypatch.context() as patch:
        patch.setattr(pool.models, "response_logps", noted)
        scores = pool.score_lists(c, world, model, examples)
    kinds = ([one, two, three], [], [three], [two], [one, two, three])
    expected = [(e.prompt_ids, list(ids)) for e, kind in zip(examples, kinds) for ids in kind]
    assert sorted(scored) == sorted(expected)
    assert scores[0][0] == scores[0][2] == scores[0][4] and scores[3][0] == scores[3][1]
    assert pool.score_lists(c, world, model, examples[1:2]) == [[]]
    for example, row in zip(examples, scores, strict=True):
        for ids, logp in zip(example.response_ids, row, strict=True):
            alone = dataclasses.replace(example, response_ids=[ids], rewards=[0.0])
            assert logp == pytest.approx(pool.score_lists(c, world, model, [alone])[0][0], abs=1e-5)


def test_a_long_list_is_scored_in_pieces_that_a_batch_has_room_for(monkeypatch):
    c, world, model = untrained()
    responses = enumerate_responses(world)
    lists = [responses[:40], responses[3:5], responses[100:117]]
    examples = pool.with_responses(world.rounds[0][:3], lists)
    whole = pool.score_lists(c, world, model, examples)
    sizes, real = [], models.response_logps

    def noted(model, batch, allowed):
        sizes.append(batch.candidate_mask.numel())
        return real(model, batch, allowed)

    monkeypatch.setattr(pool.models, "response_logps", noted)
    narrow = dataclasses.replace(world, max_response=150_000 // world.enc.n_vocab)  # ten at a time
    pieces = pool.score_lists(c, narrow, model, examples)
    assert sizes[:5] == [10] * 5 and max(sizes) == 10 and sum(sizes) == 40 + 2 + 17
    for first, second in zip(whole, pieces, strict=True):
        assert first == pytest.approx(second, abs=1e-5)


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
