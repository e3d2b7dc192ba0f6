"""The reward-KL frontier: closed forms, the oracle, enumeration against sampling."""

import math

import oracle
import pytest
import torch
from helpers import REF, close, mean_kl, problem, reward_of, tensors

import dro
import frontier

# --------------------------------------------------------------------------------- the greedy limit


def test_greedy_is_the_limit_of_small_tau():
    ref_logps, rewards = tensors()
    limit = dro.optimal_logps(ref_logps, rewards, 1e-6).exp()
    close(frontier.greedy_logps(ref_logps, rewards).exp(), limit)


def test_greedy_shares_the_mass_of_equally_good_responses_as_the_reference_does():
    ref_logps = torch.tensor([REF, REF]).log()
    rewards = torch.tensor([[0.0, 1.0, 1.0], [-3.0, -5.0, -3.0]])
    shares = [[0.0, 0.3 / 0.5, 0.2 / 0.5], [0.5 / 0.7, 0.0, 0.2 / 0.7]]
    close(frontier.greedy_logps(ref_logps, rewards).exp(), shares, 1e-6)


def test_shapes_that_would_broadcast_are_refused():
    ref_logps, rewards = problem()
    for wrong in (rewards[:, :1], rewards[:1], rewards[0], rewards.T, rewards[..., None]):
        with pytest.raises(ValueError, match="one shape"):
            frontier.frontier(ref_logps, ref_logps, wrong)
        with pytest.raises(ValueError, match="one shape"):
            frontier.frontier(ref_logps, wrong, rewards)


# -------------------------------------------------------------------------------- tau at a given KL


@pytest.mark.parametrize("tau", [0.1, 0.7, 3.0])
def test_tau_is_found_again_from_its_kl(tau):
    ref_logps, rewards = problem()
    K = mean_kl(dro.optimal_logps(ref_logps, rewards, tau), ref_logps)
    assert frontier.tau_at_kl(ref_logps, rewards, K) == pytest.approx(tau, rel=1e-6)
    judged = oracle.tau_at_kl(ref_logps.exp().numpy(), rewards.numpy(), K)
    assert judged == pytest.approx(tau, rel=1e-6)


def test_kl_beyond_the_greedy_policy_is_reached_by_no_tau():
    limit = math.log(1 / 0.5)  # all mass on the best response
    assert frontier.tau_at_kl(*tensors(), 0.99 * limit) > 0
    assert math.isnan(frontier.tau_at_kl(*tensors(), 1.01 * limit))


def test_constant_rewards_have_no_tau():
    assert math.isnan(frontier.tau_at_kl(*tensors(rewards=(0.1, 0.1, 0.1)), 0.5))


# ------------------------------------------------------------------------- the frontier, enumerated


def test_the_optimum_has_efficiency_1():
    ref_logps, rewards = problem()
    for tau in (0.2, 1.0, 4.0):
        best = dro.optimal_logps(ref_logps, rewards, tau)
        f = frontier.frontier(ref_logps, best, rewards, resamples=2)
        assert f.efficiency == pytest.approx(1, abs=1e-6) and f.tau == pytest.approx(tau, rel=1e-6)
        assert f.kl == pytest.approx(f.optimal_kl, abs=1e-9)
        assert f.kl == pytest.approx(mean_kl(best, ref_logps))
        sizes = 1 / best.exp().square().sum(-1)
        assert f.effective_sample_size == pytest.approx(sizes.mean().item())


def test_no_random_policy_beats_the_optimum_of_its_kl():
    ref_logps, rewards = problem(B=3, M=5)
    for seed in range(40):
        noise = problem(B=3, M=5, seed=200 + seed)[1]
        logps = (ref_logps + rewards * (seed % 5) / 2 + noise * (seed % 3 + 1) / 4).log_softmax(-1)
        f = frontier.frontier(ref_logps, logps, rewards, resamples=2)
        refs, earned = ref_logps.exp().numpy(), rewards.numpy()
        tau = oracle.tau_at_kl(refs, earned, mean_kl(logps, ref_logps))
        best = [oracle.tilt(b, r, tau) @ r for b, r in zip(refs, earned)]
        assert f.efficiency < 1 and f.optimal_reward == pytest.approx(sum(best) / 3, abs=1e-6)
        assert f.policy_reward == pytest.approx(reward_of(logps, rewards))
        assert f.reference_reward == pytest.approx(reward_of(ref_logps, rewards))
        gain = f.policy_reward - f.reference_reward
        assert f.efficiency == pytest.approx(gain / (f.optimal_reward - f.reference_reward))


def test_one_tau_for_all_prompts_beats_the_same_kl_spent_on_each_prompt():
    ref_logps, rewards = problem(B=2)
    # Little to gain at one prompt, much at the other.
    rewards = rewards * torch.tensor([[0.2], [5.0]], dtype=torch.float64)
    K = 0.4

    def at_kl(ref_logps, rewards):
        return dro.optimal_logps(ref_logps, rewards, frontier.tau_at_kl(ref_logps, rewards, K))

    prompts = zip(ref_logps.split(1), rewards.split(1))
    matched = torch.cat([at_kl(*prompt) for prompt in prompts])
    shared = at_kl(ref_logps, rewards)
    assert mean_kl(matched, ref_logps) == pytest.approx(K)
    assert mean_kl(shared, ref_logps) == pytest.approx(K)
    assert reward_of(shared, rewards) > reward_of(matched, rewards) + 0.1
    f = frontier.frontier(ref_logps, matched, rewards)
    assert f.optimal_reward == pytest.approx(reward_of(shared, rewards)) and f.efficiency < 0.95


def test_one_normaliser_for_all_prompts_would_claim_more_than_any_policy_earns():
    (ref_logps, rewards), tau = problem(), 0.7
    pooled = (ref_logps + rewards / tau - math.log(5)).flatten().log_softmax(-1).exp()
    most = reward_of(dro.optimal_logps(ref_logps, rewards, tau), rewards)
    assert (pooled * rewards.flatten()).sum() > most + 0.1


def test_a_policy_that_spends_more_kl_than_any_optimum_is_measured_against_the_greedy_one():
    ref_logps, rewards = tensors()
    worst = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).log()
    f = frontier.frontier(ref_logps, worst, rewards)
    assert f.tau == 0 and f.kl == pytest.approx(math.log(1 / 0.2))
    assert f.optimal_kl == pytest.approx(math.log(1 / 0.5))
    assert f.optimal_reward == pytest.approx(1)
    assert f.efficiency == pytest.approx((-1 - 0.3) / (1 - 0.3))
    greedy = frontier.greedy_logps(ref_logps, rewards)
    assert frontier.frontier(ref_logps, greedy, rewards).efficiency == pytest.approx(1)


def test_a_policy_equal_to_the_reference_gains_nothing():
    ref_logps, rewards = problem()
    f = frontier.frontier(ref_logps, ref_logps, rewards)
    assert f.kl == pytest.approx(0, abs=1e-12) and f.efficiency == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.1, -2.7, (0.1, 0.2, 0.3, 0.4, 0.5)])
def test_rewards_constant_within_each_prompt_have_no_efficiency(reward):
    ref_logps, logps = problem()[0], problem(seed=1)[0]
    each = torch.tensor(reward, dtype=torch.float64).view(-1, 1)
    rewards = torch.zeros(5, 7, dtype=torch.float64) + each
    assert math.isnan(frontier.frontier(ref_logps, logps, rewards).efficiency)


# ---------------------------------------------------------------------------- the frontier, sampled


def test_mixture_weights_by_hand():
    ratios = torch.tensor([[math.log(3), 0.0, -math.log(3)]], dtype=torch.float64)
    rho = [2 / (1 + 3), 1, 2 / (1 + 1 / 3)]  # reference over mixture
    log_b, log_w = frontier.mixture_weights(ratios)
    close(log_b.exp(), [[x / sum(rho) for x in rho]])
    w = [rho[0] * 3, rho[1], rho[2] / 3]
    close(log_w.exp(), [[x / sum(w) for x in w]])


def test_mixture_weights_are_normalised_within_each_prompt_and_survive_large_ratios():
    ratios = torch.tensor([[-500.0, 0.0, 500.0], [90.0, 91.0, 92.0]])
    for log_weights in frontier.mixture_weights(ratios):
        close(log_weights.double().exp().sum(-1), [1.0, 1.0], 1e-5)
    # Exchanging reference and policy exchanges the weights.
    swapped = reversed(frontier.mixture_weights(-ratios))
    for log_weights, others in zip(frontier.mixture_weights(ratios), swapped):
        close(log_weights.double().exp(), others.double().exp(), 1e-5)


def categorical(tau, noise, B=64, M=2000):
    """A big categorical problem: reference, a policy near its optimum at tau, true rewards."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda: torch.randn(B, M, generator=generator, dtype=torch.float64)
    ref_logps, rewards = draw().log_softmax(-1), draw()
    return ref_logps, (ref_logps + (rewards + noise * draw()) / tau).log_softmax(-1), rewards


def drawn(logps, count):
    generator = torch.Generator().manual_seed(3)
    return torch.multinomial(logps.exp(), count, replacement=True, generator=generator)


@pytest.mark.parametrize("tau, noise", [(0.8, 0.7), (0.4, 0.0), (0.45, 0.5)])
def test_the_sampled_mixture_is_close_to_the_enumerated_truth(tau, noise):
    ref_logps, logps, rewards = categorical(tau, noise)
    truth = frontier.frontier(ref_logps, logps, rewards, resamples=2)
    at = torch.cat([drawn(ref_logps, 128), drawn(logps, 128)], -1)
    weights = frontier.mixture_weights((logps - ref_logps).gather(-1, at))
    f = frontier.frontier(*weights, rewards.gather(-1, at))
    assert f.effective_sample_size > 20
    assert f.efficiency == pytest.approx(truth.efficiency, abs=0.015) and f.efficiency <= 1 + 1e-9
    assert f.kl == pytest.approx(truth.kl, rel=0.03)
    assert f.policy_reward == pytest.approx(truth.policy_reward, abs=0.03)
    assert f.reference_reward == pytest.approx(truth.reference_reward, abs=0.03)
    assert f.optimal_reward == pytest.approx(truth.optimal_reward, abs=2 * f.optimal_reward_se)


def test_reference_samples_alone_flatter():
    ref_logps, logps, rewards = categorical(tau=0.36, noise=0.0)
    truth = frontier.frontier(ref_logps, logps, rewards, resamples=2)
    assert truth.kl > 3 and truth.efficiency == pytest.approx(1, abs=1e-6)
    seen = rewards.gather(-1, drawn(ref_logps, 64))
    uniform = torch.full_like(seen, -math.log(64))
    tau = frontier.tau_at_kl(uniform, seen, truth.kl)
    best = reward_of(dro.optimal_logps(uniform, seen, tau), seen)
    efficiency = (truth.policy_reward - truth.reference_reward) / (best - truth.reference_reward)
    assert 1.05 < efficiency < 1.3


def test_the_same_seed_gives_the_same_frontier_and_its_standard_error_is_the_spread():
    """The spread over 40 samples of 50 prompts."""
    ref_logps, rewards = problem(B=2000, M=5)
    logps = (ref_logps + rewards / 2 + problem(B=2000, M=5, seed=1)[1] / 4).log_softmax(-1)
    samples = list(zip(ref_logps.split(50), logps.split(50), rewards.split(50)))
    fifty = [frontier.frontier(*sample, resamples=60) for sample in samples]
    assert fifty[0] == frontier.frontier(*samples[0], resamples=60)
    for value, se in (("efficiency", "efficiency_se"), ("optimal_reward", "optimal_reward_se")):
        spread = torch.tensor([getattr(f, value) for f in fifty]).std().item()
        assert sum(getattr(f, se) for f in fifty) / 40 == pytest.approx(spread, rel=0.35)


# ----------------------------------------------------------------------------------- frontier curve


def test_the_curve_is_the_frontier():
    ref_logps, rewards = problem()
    kl, reward = frontier.frontier_curve(ref_logps, rewards)
    assert kl.shape == reward.shape and kl.shape[1] == 5
    assert (kl.mean(1).diff() > -1e-12).all() and (reward.mean(1).diff() > -1e-9).all()
    close(reward[-1], rewards.max(-1).values)
    for tau in (0.4, 2.0):
        optimum = dro.optimal_logps(ref_logps, rewards, tau)
        K = mean_kl(optimum, ref_logps)
        i = torch.searchsorted(kl.mean(1), torch.tensor(K, dtype=torch.float64))
        low, high = reward.mean(1)[i - 1], reward.mean(1)[i]
        assert low - 1e-9 <= reward_of(optimum, rewards) <= high + 1e-9
