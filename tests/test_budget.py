"""The budget: how N rewards are read, how passes are chosen, what leaks, what it writes."""

import json
import math

import pytest
import torch
from helpers import SMALL

from dro import optimal_logps
from experiments import budget, cells
from harness.config import resolve
from harness.pool import make_world, reward_list, round_prompts
from tasks import make_task

OWN = {
    **{name: SMALL[name] for name in ("layers", "heads", "width", "task", "eval_prompts")},
    "reference_steps": 40,
    "eval_samples": 32,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def small_budget(tmp_path_factory):
    """A budget of two rows, two sizes and two numbers of passes: (results, folder)."""
    folder = tmp_path_factory.mktemp("budget")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(budget, "COMMON", {**budget.COMMON, **OWN})
        patch.setattr(budget, "SHORT", {})
        patch.setattr(budget, "QUICK", {"sizes": (256, 512), "passes": (1, 2), "seeds": 2})
        patch.setattr(budget, "ROWS", {row: budget.ROWS[row] for row in list(budget.ROWS)[:3:2]})
        patch.setattr(budget, "run_cells", lambda cs, jobs: list(map(cells.run_one, cs)))
        results = budget.main(quick=True)
    return results, folder


@pytest.mark.parametrize("row", budget.ROWS)
def test_a_pass_reads_every_scored_response_once_and_an_update_128_of_them(row):
    for size in budget.WHOLE["sizes"]:
        for passes in budget.passes_to_try(size, budget.WHOLE["passes"]):
            c = resolve(budget.config_of(row, size, passes, 1, budget.COMMON))
            assert c.evolve == 1 and c.iterate == passes and c.seed == 1
            assert c.candidates * c.batch_size == budget.AN_UPDATE
            ((_, prompts),) = round_prompts(c, 8_000, 220_500)
            assert abs(prompts * c.candidates / size - 1) < 0.03
            assert abs(c.steps * budget.AN_UPDATE / (size * passes) - 1) < 0.03


def test_only_a_number_of_passes_that_takes_hours_is_left_out():
    tried = {n: budget.passes_to_try(n, (1, 3, 10)) for n in budget.WHOLE["sizes"]}
    most = {30_000: [1, 3], 100_000: [1]}
    assert tried == {**dict.fromkeys((1_000, 3_000, 10_000), [1, 3, 10]), **most}


def test_all_rows_start_from_one_reference():
    configs = [resolve(budget.config_of(row, 1_000, 1, 0, budget.COMMON)) for row in budget.ROWS]
    assert len({(c.reference_steps, c.reference_lr, c.reference_batch) for c in configs}) == 1
    assert {c.batch_size for c in configs} == {16, 128}


def test_the_prompts_that_choose_the_passes_are_read_by_no_run():
    task = make_task("dialogue")
    for row in budget.ROWS:
        c = resolve(budget.config_of(row, 100_000, 1, 0, budget.COMMON))
        ((start, prompts),) = round_prompts(c, c.reference_steps * c.reference_batch, 220_500)
        assert start + prompts < len(task.train) - c.eval_prompts


def test_the_passes_of_most_reward_are_taken_the_fewest_at_a_tie():
    assert budget.most_reward({1: 4.0, 3: 5.0, 10: 4.5}) == 3
    assert budget.most_reward({1: 5.0, 3: 5.0, 10: 4.5}) == 1
    assert budget.most_reward({1: -2.0, 3: None, 10: -1.0}) == 10
    assert budget.most_reward({1: None, 3: None}) == 1


def test_the_reward_at_a_kl_is_of_the_last_time_it_is_passed_between_two_looks():
    path = [(0.6, 2.0), (0.6, 2.5), (0.2, 3.0), (1.0, 5.0), (0.9, 6.0)]
    assert budget.reward_at(path, 0.3) == pytest.approx(3.0 + 2.0 * 0.1 / 0.8)  # up, after down
    assert budget.reward_at(path, 0.95) == pytest.approx((5.0 + 6.0) / 2)  # down, after up
    assert budget.reward_at(path, 0.9) == 6.0
    assert budget.reward_at(path, 1.5) is None and budget.reward_at(path[:2], 0.6) is None
    assert budget.reward_at(path, 0.1) is None  # before its first look nobody knows


def test_leaks_by_hand():
    # A prompt, two samples of the reference, the first broken, and two of the policy, no one.
    ratios = torch.tensor([[2.0, -1.0, 0.5, 1.5]], dtype=torch.float64)
    broken = torch.tensor([[True, False, False, False]])
    rewards = torch.tensor([[0.0, 3.0, 4.0, 6.0]], dtype=torch.float64)
    m = budget.leak_metrics(ratios, broken, rewards)
    assert set(m) == set(budget.LEAKS)
    assert (m["reference_broken"], m["policy_broken"]) == (1 / 2, 0.0)
    assert (m["reference_ratio_broken"], m["reference_ratio_unbroken"]) == (2.0, -1.0)
    assert m["policy_ratio_broken"] is None and m["policy_ratio_unbroken"] == (0.5 + 1.5) / 2
    assert m["policy_unbroken_reward"] == (4 + 6) / 2


def test_the_optimum_of_the_leak_table_is_that_of_the_policys_kl():
    g = torch.Generator().manual_seed(0)
    n, tau = 4_000, 0.7  # a policy that is pi* itself, over 5 responses of which one is broken
    log_b = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.1]], dtype=torch.float64).log()
    rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0, 1.5]], dtype=torch.float64)
    best = optimal_logps(log_b, rewards, tau)
    drawn = torch.cat([p.exp().multinomial(n, True, generator=g) for p in (log_b, best)], -1)
    ratios = (best - log_b).gather(-1, drawn)
    m = budget.leak_metrics(ratios, drawn == 0, rewards.gather(-1, drawn))
    share = best.exp()[0]
    assert m["optimum_broken"] == pytest.approx(share[0].item(), abs=0.01)
    mean = (share[1:] @ rewards[0, 1:] / share[1:].sum()).item()
    assert m["optimum_unbroken_reward"] == pytest.approx(mean, abs=0.05)
    assert m["policy_broken"] == pytest.approx(share[0].item(), abs=0.02)


def test_the_leak_table_tells_of_no_optimum_that_is_not_there_or_is_a_few_samples():
    rewards = torch.linspace(1, 5, 80, dtype=torch.float64)[None]
    at_random = torch.randn(1, 80, generator=torch.Generator().manual_seed(0)).double()
    beyond = torch.cat([torch.full((1, 40), -9.0), torch.full((1, 40), 9.0)], -1).double()
    optimum = ("optimum_broken", "optimum_unbroken_reward")
    metrics = lambda ratios: budget.leak_metrics(ratios, rewards < 0, rewards)
    assert all(metrics(0.3 * at_random)[name] is not None for name in optimum)
    for m in (metrics(beyond), metrics(5 * at_random)):
        assert all(m[name] is None for name in optimum) and m["policy_broken"] == 0.0
    rewards = torch.cat([torch.ones(1, 10), torch.full((1, 70), 5.0)], -1).double()  # 30 of 40 best
    assert all(metrics(beyond)[name] is None for name in optimum)


def test_it_makes_the_passes_that_earned_most_and_writes_what_it_found(small_budget):
    results, folder = small_budget
    assert list(results["rows"]) == ["dro, single", "lire, lists"]
    assert len(results["tried"]) == 2 * 2 * 2
    for row, sizes in results["rows"].items():
        for size, seeds in sizes.items():
            tried = {n: r for own, N, n, r in results["tried"] if (own, str(N)) == (row, size)}
            assert results["passes"][row][size] == max(tried, key=tried.get)
            assert len(seeds) == 2 and all(math.isfinite(m["kl"]) for m in seeds)
            assert all(set(m["leaks"]) == set(budget.LEAKS) for m in seeds)
    written = json.loads((folder / "results" / "budget-quick.json").read_text())
    assert written["results"] == results
    assert written["command"] == "python -m experiments.budget --quick"
    text = (folder / "results" / "budget-quick.txt").read_text()
    assert text == budget.table(results) + "\n" and "nan" not in text and "None" not in text
    assert text.count("| dro, single | 256 |") == 2  # what it earns, and where it leaks
    chosen = results["passes"]["dro, single"]["256"]
    (reward,) = [r for *own, r in results["tried"] if own == ["dro, single", 256, chosen]]
    assert f"{chosen}: {reward:.2f}*" in text and text.count("*") == 2 * 2 + 1
    pytest.importorskip("matplotlib")
    assert (folder / "results" / "budget-quick.png").stat().st_size > 10_000


def test_the_cells_own_numbers_stand_in_the_table(small_budget, monkeypatch):
    results, folder = small_budget
    monkeypatch.chdir(folder)
    size, passes = "512", results["passes"]["lire, lists"]["512"]
    c = budget.config_of("lire, lists", 512, passes, 1, {**budget.COMMON, **OWN})
    metrics = json.loads((cells.folder_of(c) / "metrics.json").read_text())
    found = results["rows"]["lire, lists"][size][1]
    for name in ("policy_reward", "reference_reward", "kl", "efficiency", "policy_broken"):
        assert found[name] == metrics.get(name)
    rows = map(json.loads, (cells.folder_of(c) / "log.jsonl").read_text().splitlines())
    assert found["path"] == [[row["kl"], row["reward"]] for row in rows if "kl" in row]
    for kl in budget.LEVELS:
        assert found[f"reward_at_{kl:g}"] == budget.reward_at(found["path"], kl)
    monkeypatch.setattr(budget, "reward_at", lambda path, kl: kl)
    monkeypatch.setattr(budget, "leaks", lambda c, world: {"policy_broken": "its own"})
    found = budget.measured(c, None)
    assert [found[f"reward_at_{kl}"] for kl in ("0.5", "1", "2")] == [0.5, 1.0, 2.0]
    assert found["policy_broken"] == metrics.get("policy_broken")


def same(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in others)


def test_passes_are_judged_by_the_policy_on_the_last_training_prompts(small_budget, monkeypatch):
    _, folder = small_budget
    monkeypatch.chdir(folder)
    c = budget.config_of("lire, lists", 512, 1, 0, {**budget.COMMON, **OWN})
    world, seen, sample = budget.small_world(c), [], budget.sample_lists

    def spy(c, world, model, examples, *rest):
        lists = sample(c, world, model, examples, *rest)
        seen.append((model.state_dict(), [e.prompt for e in examples], lists))
        return lists

    monkeypatch.setattr(budget, "sample_lists", spy)
    reward = budget.unread_reward(c, world)
    ((weights, prompts, lists),) = seen
    folder = cells.folder_of(c)
    policy = torch.load(folder / "checkpoint.pt", weights_only=False)["policy"]
    assert same(weights, policy)
    assert prompts == world.task.train[-OWN["eval_prompts"] :]
    marks = [reward_list(world, prompt, own) for prompt, own in zip(prompts, lists)]
    assert reward == pytest.approx(torch.tensor(marks).mean().item())

    # The leak table: both models' samples on held-out prompts, the reference's first.
    seen.clear()
    monkeypatch.setattr(budget, "leak_metrics", lambda *tensors: tensors)
    ratios, broken, rewards = budget.leaks(c, world)
    (ref_weights, prompts, first), (weights, _, second) = seen
    reference = torch.load(folder / "reference.pt")
    assert same(ref_weights, reference) and same(weights, policy)
    assert prompts == [e.prompt for e in world.heldout[: OWN["eval_prompts"]]]
    n = OWN["eval_samples"]
    assert ratios[:, :n].mean() < 0 < ratios[:, n:].mean()  # each its own samples
    for own, lists in ((rewards[:, :n], first), (rewards[:, n:], second)):
        assert own[0].tolist() == pytest.approx(reward_list(world, prompts[0], lists[0]))
    assert torch.equal(broken, rewards == 0)


def test_a_mean_of_some_seeds_alone_is_no_point_of_the_picture():
    assert budget.point_of([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert math.isnan(budget.point_of([1.0, None])[0])
    assert budget.in_percent([0.5, None]) == "50.0% (1 of 2)" and budget.in_percent([None]) == "-"


def test_the_small_world_is_the_cells_own_but_for_what_it_trains_on():
    c = budget.config_of("lire, lists", 512, 1, 0, {**budget.COMMON, **OWN})
    small, whole = budget.small_world(c), make_world(resolve(c))
    assert small.ranks == whole.ranks and small.heldout == whole.heldout
    assert small.logged == whole.logged and len(small.rounds[0]) == 16 < len(whole.rounds[0])
