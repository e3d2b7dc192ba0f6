"""DRO's optimum and the reward-KL frontier: closed forms, the oracle, invariances, enumeration against sampling."""

import math

import oracle
import pytest
import torch

import dro
import frontier

REF, R = (0.5, 0.3, 0.2), (1.0, 0.0, -1.0)


def tensors(ref=REF, r=R):
    """One prompt: log-probabilities of the reference and rewards, [1, M]."""
    return torch.tensor([ref], dtype=torch.float64).log(), torch.tensor([r], dtype=torch.float64)


def problem(B=5, M=7, seed=0):
    """B prompts with M enumerated responses: log-probabilities of a random reference, rewards."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, M, generator=generator, dtype=torch.float64)
    return draw().log_softmax(-1), 2 * draw()


def close(a, b, tol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=tol,
        atol=tol,
    )


def reward_of(logps, rewards):
    return (logps.exp() * rewards).sum(-1).mean().item()


def mean_kl(logps, ref_logps):
    return dro.kl_divergence(logps, ref_logps).mean().item()


# ------------------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_value_and_policy_by_hand(tau):
    V = tau * math.log(0.5 * math.exp(1 / tau) + 0.3 + 0.2 * math.exp(-1 / tau))
    pi = [0.5 * math.exp((1 - V) / tau), 0.3 * math.exp(-V / tau), 0.2 * math.exp((-1 - V) / tau)]
    close(dro.optimal_value(*tensors(), tau), [V])
    close(dro.optimal_logps(*tensors(), tau).exp(), [pi])


@pytest.mark.parametrize("tau", [0.1, 0.7, 3.0])
def test_value_policy_and_kl_equal_the_oracle(tau):
    ref_logps, rewards = problem()
    value, logps = (
        dro.optimal_value(ref_logps, rewards, tau),
        dro.optimal_logps(ref_logps, rewards, tau),
    )
    kl = dro.kl_divergence(logps, ref_logps)
    for i, (b, r) in enumerate(zip(ref_logps.exp().numpy(), rewards.numpy())):
        close(value[i], oracle.optimal_value(b, r, tau))
        close(logps[i].exp(), oracle.optimal_policy(b, r, tau))
        close(logps[i].exp(), oracle.tilt(b, r, tau))
        close(kl[i], oracle.kl(oracle.tilt(b, r, tau), b))


def test_the_policy_is_normalised_within_each_prompt():
    close(dro.optimal_logps(*problem(), 0.3).exp().sum(-1), [1.0] * 5)


def test_the_optimum_earns_its_value_and_every_other_policy_less():
    (ref_logps, rewards), tau = problem(), 0.7
    objective = lambda logps: (
        (logps.exp() * rewards).sum(-1) - tau * dro.kl_divergence(logps, ref_logps)
    )
    value = dro.optimal_value(ref_logps, rewards, tau)
    close(objective(dro.optimal_logps(ref_logps, rewards, tau)), value)
    for seed in range(20):
        assert (objective(problem(seed=100 + seed)[0]) < value).all()


def test_the_residual_of_the_optimum_is_zero():
    (ref_logps, rewards), tau = problem(), 0.7
    V = dro.optimal_value(ref_logps, rewards, tau)[:, None]
    close(
        rewards - V - tau * (dro.optimal_logps(ref_logps, rewards, tau) - ref_logps),
        torch.zeros(5, 7),
    )


def test_a_constant_added_to_a_prompts_rewards_moves_its_value_and_leaves_the_policy():
    ref_logps, rewards = problem()
    c = torch.tensor([[3.0], [-7.0], [0.0], [11.0], [0.5]], dtype=torch.float64)
    close(
        dro.optimal_value(ref_logps, rewards + c, 0.7),
        dro.optimal_value(ref_logps, rewards, 0.7) + c[:, 0],
    )
    close(
        dro.optimal_logps(ref_logps, rewards + c, 0.7), dro.optimal_logps(ref_logps, rewards, 0.7)
    )


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_rewards_times_c_are_tau_over_c(c):
    ref_logps, rewards = problem()
    close(
        dro.optimal_logps(ref_logps, c * rewards, 0.7),
        dro.optimal_logps(ref_logps, rewards, 0.7 / c),
    )
    close(
        dro.optimal_value(ref_logps, c * rewards, 0.7),
        c * dro.optimal_value(ref_logps, rewards, 0.7 / c),
    )


def test_small_tau_is_greedy_and_large_tau_is_the_reference():
    ref_logps, rewards = tensors()
    close(dro.optimal_value(ref_logps, rewards, 1e-6), [1.0], 1e-5)
    close(
        dro.optimal_logps(ref_logps, rewards, 1e-6).exp(),
        frontier.greedy_logps(ref_logps, rewards).exp(),
    )
    close(dro.optimal_value(ref_logps, rewards, 1e6), [0.5 - 0.2], 1e-5)
    close(dro.optimal_logps(ref_logps, rewards, 1e6).exp(), [REF], 1e-5)


def test_greedy_shares_the_mass_of_equally_good_responses_as_the_reference_does():
    ref_logps, rewards = (
        torch.tensor([REF, REF]).log(),
        torch.tensor([[0.0, 1.0, 1.0], [-3.0, -5.0, -3.0]]),
    )
    close(
        frontier.greedy_logps(ref_logps, rewards).exp(),
        [[0.0, 0.3 / 0.5, 0.2 / 0.5], [0.5 / 0.7, 0.0, 0.2 / 0.7]],
        1e-6,
    )


def test_a_response_impossible_under_the_reference_stays_impossible():
    ref_logps, rewards = tensors((0.6, 0.4, 0.0), (0.0, 1.0, 100.0))
    logps = dro.optimal_logps(ref_logps, rewards, 1.0)
    close(logps.exp(), [[0.6 / (0.6 + 0.4 * math.e), 0.4 * math.e / (0.6 + 0.4 * math.e), 0.0]])
    assert dro.kl_divergence(logps, ref_logps).isfinite().all()


def test_kl_divergence_by_hand():
    p, q = tensors((0.75, 0.25, 0.0))[0], tensors()[0]
    close(dro.kl_divergence(p, q), [0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.3)])
    close(dro.kl_divergence(q, q), [0.0])
    assert dro.kl_divergence(q, p).item() == math.inf


def test_shapes_that_would_broadcast_and_impossible_tau_are_refused():
    ref_logps, rewards = problem()
    for wrong in (rewards[:, :1], rewards[:1], rewards[0], rewards.T, rewards[..., None]):
        for call in (
            lambda w: dro.optimal_value(ref_logps, w, 1.0),
            lambda w: dro.optimal_logps(w, rewards, 1.0),
            lambda w: dro.kl_divergence(ref_logps, w),
            lambda w: frontier.frontier(ref_logps, ref_logps, w),
            lambda w: frontier.frontier(ref_logps, w, rewards),
        ):
            with pytest.raises(ValueError, match="one shape"):
                call(wrong)
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tau"):
            dro.optimal_value(ref_logps, rewards, tau)


# ---------------------------------------------------------------------------------------------------------- tau at a given KL


@pytest.mark.parametrize("tau", [0.1, 0.7, 3.0])
def test_tau_is_found_again_from_its_kl(tau):
    ref_logps, rewards = problem()
    K = mean_kl(dro.optimal_logps(ref_logps, rewards, tau), ref_logps)
    assert frontier.tau_at_kl(ref_logps, rewards, K) == pytest.approx(tau, rel=1e-6)
    assert oracle.tau_at_kl(ref_logps.exp().numpy(), rewards.numpy(), K) == pytest.approx(
        tau, rel=1e-6
    )


def test_kl_beyond_the_greedy_policy_is_reached_by_no_tau():
    limit = math.log(1 / 0.5)  # all mass on the best response
    assert frontier.tau_at_kl(*tensors(), 0.99 * limit) > 0
    assert math.isnan(frontier.tau_at_kl(*tensors(), 1.01 * limit))


def test_constant_rewards_have_no_tau():
    assert math.isnan(frontier.tau_at_kl(*tensors(r=(0.1, 0.1, 0.1)), 0.5))


# ------------------------------------------------------------------------------------------------------ the frontier, enumerated


def test_the_optimum_has_efficiency_1():
    ref_logps, rewards = problem()
    for tau in (0.2, 1.0, 4.0):
        best = dro.optimal_logps(ref_logps, rewards, tau)
        f = frontier.frontier(ref_logps, best, rewards, resamples=2)
        assert f.efficiency == pytest.approx(1, abs=1e-6) and f.tau == pytest.approx(tau, rel=1e-6)
        assert f.kl == pytest.approx(f.optimal_kl, abs=1e-9) and f.kl == pytest.approx(
            mean_kl(best, ref_logps)
        )
        assert f.effective_sample_size == pytest.approx(
            (1 / best.exp().square().sum(-1)).mean().item()
        )


def test_no_random_policy_beats_the_optimum_of_its_kl():
    ref_logps, rewards = problem(B=3, M=5)
    for seed in range(40):
        noise = problem(B=3, M=5, seed=200 + seed)[1]
        logps = (ref_logps + rewards * (seed % 5) / 2 + noise * (seed % 3 + 1) / 4).log_softmax(-1)
        f = frontier.frontier(ref_logps, logps, rewards, resamples=2)
        tau = oracle.tau_at_kl(ref_logps.exp().numpy(), rewards.numpy(), mean_kl(logps, ref_logps))
        best = [
            oracle.tilt(b, r, tau) @ r for b, r in zip(ref_logps.exp().numpy(), rewards.numpy())
        ]
        assert f.efficiency < 1 and f.optimal_reward == pytest.approx(sum(best) / 3, abs=1e-6)
        assert f.policy_reward == pytest.approx(
            reward_of(logps, rewards)
        ) and f.reference_reward == pytest.approx(reward_of(ref_logps, rewards))
        assert f.efficiency == pytest.approx(
            (f.policy_reward - f.reference_reward) / (f.optimal_reward - f.reference_reward)
        )


def test_one_tau_for_all_prompts_beats_the_same_kl_spent_on_each_prompt():
    ref_logps, rewards = problem(B=2)
    rewards = rewards * torch.tensor(
        [[0.2], [5.0]], dtype=torch.float64
    )  # little to gain at one prompt, much at the other
    K = 0.4
    each = [frontier.tau_at_kl(ref_logps[i : i + 1], rewards[i : i + 1], K) for i in range(2)]
    matched = torch.cat(
        [dro.optimal_logps(ref_logps[i : i + 1], rewards[i : i + 1], each[i]) for i in range(2)]
    )
    shared = dro.optimal_logps(ref_logps, rewards, frontier.tau_at_kl(ref_logps, rewards, K))
    assert mean_kl(matched, ref_logps) == pytest.approx(K) and mean_kl(
        shared, ref_logps
    ) == pytest.approx(K)
    assert reward_of(shared, rewards) > reward_of(matched, rewards) + 0.1
    f = frontier.frontier(ref_logps, matched, rewards)
    assert f.optimal_reward == pytest.approx(reward_of(shared, rewards)) and f.efficiency < 0.95


def test_one_normaliser_for_all_prompts_would_claim_more_than_any_policy_earns():
    (ref_logps, rewards), tau = problem(), 0.7
    pooled = (ref_logps + rewards / tau - math.log(5)).flatten().log_softmax(-1).exp()
    assert (pooled * rewards.flatten()).sum() > reward_of(
        dro.optimal_logps(ref_logps, rewards, tau), rewards
    ) + 0.1


def test_a_policy_that_spends_more_kl_than_any_optimum_is_measured_against_the_greedy_one():
    ref_logps, rewards = tensors()
    worst = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).log()
    f = frontier.frontier(ref_logps, worst, rewards)
    assert (
        f.tau == 0
        and f.kl == pytest.approx(math.log(1 / 0.2))
        and f.optimal_kl == pytest.approx(math.log(1 / 0.5))
    )
    assert f.optimal_reward == pytest.approx(1) and f.efficiency == pytest.approx(
        (-1 - 0.3) / (1 - 0.3)
    )
    assert frontier.frontier(
        ref_logps, frontier.greedy_logps(ref_logps, rewards), rewards
    ).efficiency == pytest.approx(1)


def test_a_policy_equal_to_the_reference_gains_nothing():
    ref_logps, rewards = problem()
    f = frontier.frontier(ref_logps, ref_logps, rewards)
    assert f.kl == pytest.approx(0, abs=1e-12) and f.efficiency == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.1, -2.7, (0.1, 0.2, 0.3, 0.4, 0.5)])
def test_rewards_constant_within_each_prompt_have_no_efficiency(reward):
    ref_logps, logps = problem()[0], problem(seed=1)[0]
    rewards = torch.zeros(5, 7, dtype=torch.float64) + torch.tensor(
        reward, dtype=torch.float64
    ).view(-1, 1)
    assert math.isnan(frontier.frontier(ref_logps, logps, rewards).efficiency)


# -------------------------------------------------------------------------------------------------------- the frontier, sampled


def test_mixture_weights_by_hand():
    l = torch.tensor([[math.log(3), 0.0, -math.log(3)]], dtype=torch.float64)  # noqa: E741
    rho = [2 / (1 + 3), 1, 2 / (1 + 1 / 3)]  # reference over mixture
    log_b, log_w = frontier.mixture_weights(l)
    close(log_b.exp(), [[x / sum(rho) for x in rho]])
    w = [rho[0] * 3, rho[1], rho[2] / 3]
    close(log_w.exp(), [[x / sum(w) for x in w]])


def test_mixture_weights_are_normalised_within_each_prompt_and_survive_large_ratios():
    ratios = torch.tensor([[-500.0, 0.0, 500.0], [90.0, 91.0, 92.0]])
    for log_weights in frontier.mixture_weights(ratios):
        close(log_weights.double().exp().sum(-1), [1.0, 1.0], 1e-5)
    swapped = frontier.mixture_weights(-ratios)[
        ::-1
    ]  # exchanging reference and policy exchanges the weights
    for a, b in zip(frontier.mixture_weights(ratios), swapped):
        close(a.double().exp(), b.double().exp(), 1e-5)


def categorical(tau, noise, B=64, M=2000):
    """A big categorical problem: reference, a policy near its optimum at tau, true rewards."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda: torch.randn(B, M, generator=generator, dtype=torch.float64)
    ref_logps, rewards = draw().log_softmax(-1), draw()
    return ref_logps, (ref_logps + (rewards + noise * draw()) / tau).log_softmax(-1), rewards


def drawn(logps, n):
    return torch.multinomial(
        logps.exp(), n, replacement=True, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("tau, noise", [(0.8, 0.7), (0.4, 0.0), (0.45, 0.5)])
def test_the_sampled_mixture_is_close_to_the_enumerated_truth(tau, noise):
    ref_logps, logps, rewards = categorical(tau, noise)
    truth = frontier.frontier(ref_logps, logps, rewards, resamples=2)
    at = torch.cat([drawn(ref_logps, 128), drawn(logps, 128)], -1)
    f = frontier.frontier(
        *frontier.mixture_weights((logps - ref_logps).gather(-1, at)), rewards.gather(-1, at)
    )
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
    best = reward_of(
        dro.optimal_logps(uniform, seen, frontier.tau_at_kl(uniform, seen, truth.kl)), seen
    )
    told = (truth.policy_reward - truth.reference_reward) / (best - truth.reference_reward)
    assert 1.05 < told < 1.3


def test_the_frontier_is_the_same_for_the_same_seed_and_its_standard_error_is_the_spread_over_prompts():
    ref_logps, rewards = problem(B=2000, M=5)
    logps = (ref_logps + rewards / 2 + problem(B=2000, M=5, seed=1)[1] / 4).log_softmax(-1)
    fifty = [
        frontier.frontier(
            ref_logps[i : i + 50], logps[i : i + 50], rewards[i : i + 50], resamples=60
        )
        for i in range(0, 2000, 50)
    ]
    assert fifty[0] == frontier.frontier(ref_logps[:50], logps[:50], rewards[:50], resamples=60)
    for value, se in (("efficiency", "efficiency_se"), ("optimal_reward", "optimal_reward_se")):
        spread = torch.tensor([getattr(f, value) for f in fifty]).std().item()
        assert sum(getattr(f, se) for f in fifty) / 40 == pytest.approx(spread, rel=0.35)


# ------------------------------------------------------------------------------------------------------------------ losses


def flat(*rows, dtype=torch.float64):
    return [torch.tensor(row, dtype=dtype) for row in rows]


BATCH = flat(
    (-3.0, -5.0), (-3.5, -4.2), (1.0, -0.5), (0.2, 0.1)
)  # logps, ref_logps, rewards, values


def random_batch(N=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(4)]


def gradient(f, *inputs):
    """d f / d each input, by autograd."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves, allow_unused=True)


@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_losses_and_gradients_by_hand(tau):
    logps, ref_logps, rewards, values = BATCH
    residual = [1.0 - 0.2 - tau * (-3.0 + 3.5), -0.5 - 0.1 - tau * (-5.0 + 4.2)]
    close(dro.dro_loss(*BATCH, tau), [d * d / 2 for d in residual])
    policy, value = dro.dro_v_losses(*BATCH, tau)
    close(value, [d * d / 2 for d in residual])
    close(policy, [3.0 * 0.8 + tau / 2 * 0.25, 5.0 * -0.6 + tau / 2 * 0.64])
    mean = lambda which: lambda s, V: dro.dro_v_losses(s, ref_logps, rewards, V, tau)[which].mean()
    by_policy, by_value = gradient(mean(0), logps, values)[0], gradient(mean(1), logps, values)[1]
    close(by_policy, [-d / 2 for d in residual])
    close(by_value, [-d / 2 for d in residual])
    if tau == 0.5:
        close(dro.dro_loss(*BATCH, tau).mean(), 0.085625)
    else:
        close(dro.dro_loss(*BATCH, tau).mean(), 3.6125)


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_losses_equal_the_oracle_and_finite_differences(tau):
    s, ref, r, V = random_batch()
    close(
        dro.dro_loss(s, ref, r, V, tau),
        oracle.dro_loss(s.numpy(), ref.numpy(), r.numpy(), V.numpy(), tau),
    )
    close(dro.dro_p_loss(s, ref, r, tau), oracle.dro_p_loss(s.numpy(), ref.numpy(), r.numpy(), tau))
    joint = lambda s, V: oracle.dro_loss(s, ref.numpy(), r.numpy(), V, tau).mean()
    by_s = oracle.finite_differences(lambda x: joint(x, V.numpy()), s.numpy())
    by_V = oracle.finite_differences(lambda x: joint(s.numpy(), x), V.numpy())
    grads = gradient(lambda s, V: dro.dro_loss(s, ref, r, V, tau).mean(), s, V)
    close(grads[0], by_s, 1e-7)
    close(grads[1], by_V, 1e-7)
    losses = lambda s, V: sum(x.mean() for x in dro.dro_v_losses(s, ref, r, V, tau))
    policy, value = gradient(losses, s, V)  # one backward through the sum serves both networks
    close(
        policy, by_s / tau, 1e-7
    )  # Eq. 8: the policy's gradient is that of the joint loss over tau
    close(value, by_V, 1e-7)
    spread = oracle.finite_differences(
        lambda x: oracle.dro_p_loss(x, ref.numpy(), r.numpy(), tau), s.numpy()
    )
    close(gradient(lambda s: dro.dro_p_loss(s, ref, r, tau), s)[0], spread, 1e-7)


def test_each_side_is_blind_to_the_other():
    s, ref, r, V = random_batch()
    policy = gradient(lambda s, V: dro.dro_v_losses(s, ref, r, V, 0.5)[0].sum(), s, V)
    value = gradient(lambda s, V: dro.dro_v_losses(s, ref, r, V, 0.5)[1].sum(), s, V)
    assert policy[1] is None and value[0] is None


def descend(coefficient, tau, mu, steps=15_000, lr=0.2):
    """Gradient descent on exact expectations over three responses: KL(pi*, pi) at the end, or nan.

    coefficient: of the squared log-ratio in the policy's loss, tau/2 in Eq. 8 over tau, 1/2 in the box of Algorithm 1.
    """
    ref, r, mu = torch.tensor(REF).double(), torch.tensor(R).double(), torch.tensor(mu).double()
    theta, V = ref.log().clone(), 0.0
    for _ in range(steps):
        logps = theta.log_softmax(-1)
        ratios = logps - ref.log()
        upstream = mu * (-(r - V) + 2 * coefficient * ratios)  # d policy loss / d logps
        theta = theta - lr * (upstream - logps.exp() * upstream.sum())
        V = V + lr * (mu * (r - tau * ratios - V)).sum().item()
        if not torch.isfinite(theta).all() or theta.abs().max() > 1e3:
            return math.nan
    optimum = dro.optimal_logps(ref.log()[None], r[None], tau)
    return dro.kl_divergence(optimum, theta.log_softmax(-1)[None]).item()


@pytest.mark.parametrize("tau, miss", [(0.1, 0.469), (0.5, 0.189)])
def test_the_box_of_algorithm_1_ends_elsewhere(tau, miss):
    """The paper prints 1/2; Eq. 8 over tau gives tau/2, which ends at pi*. (The numbers are those of METHODS' prototype.)"""
    assert descend(tau / 2, tau, (0.2, 0.3, 0.5)) < 1e-6
    assert descend(0.5, tau, (0.2, 0.3, 0.5)) == pytest.approx(miss, abs=2e-3)


def test_the_policy_loss_holds_tau_over_2_and_not_the_printed_1_over_2():
    s, ref, r, V = random_batch()
    printed = -s * (r - V) + 0.5 * (s - ref) ** 2
    assert (dro.dro_v_losses(s, ref, r, V, 0.2)[0] - printed).abs().max() > 0.1
    close(dro.dro_v_losses(s, ref, r, V, 1.0)[0], printed)


def test_dro_p_is_exact_within_a_prompt_and_biased_over_prompts_of_other_value():
    (ref_logps, rewards), tau = problem(), 0.7
    optimum = dro.optimal_logps(ref_logps, rewards, tau)
    within = [dro.dro_p_loss(s, ref, r, tau) for s, ref, r in zip(optimum, ref_logps, rewards)]
    close(torch.stack(within), torch.zeros(5))
    V = dro.optimal_value(ref_logps, rewards, tau)
    together = dro.dro_p_loss(optimum.flatten(), ref_logps.flatten(), rewards.flatten(), tau)
    close(
        together, 0.5 * V.var(correction=0)
    )  # what is left at pi* is the variance of V*, so pi* is not the minimum


def test_invariances_of_the_losses():
    s, ref, r, V = random_batch()
    base = dro.dro_loss(s, ref, r, V, 0.3)
    close(dro.dro_loss(s, ref, r + 2.0, V + 2.0, 0.3), base)  # r + c moves V by c
    close(dro.dro_loss(s, ref, 3 * r, 3 * V, 0.9), 9 * base)  # rewards times c are tau over c
    order = torch.tensor([6, 0, 3, 1, 5, 2, 4])
    close(dro.dro_loss(*(x[order] for x in (s, ref, r, V)), 0.3), base[order])
    close(dro.dro_p_loss(s, ref, r + 2.0, 0.3), dro.dro_p_loss(s, ref, r, 0.3))
    assert dro.dro_p_loss(s[:1], ref[:1], r[:1], 0.3) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_losses_compute_in_float32_at_least(dtype):
    batch = [x.to(dtype) for x in random_batch()]
    for loss in (
        dro.dro_loss(*batch, 0.5),
        *dro.dro_v_losses(*batch, 0.5),
        dro.dro_p_loss(*batch[:3], 0.5),
    ):
        assert loss.dtype == torch.float32
    close(dro.dro_loss(*batch, 0.5), dro.dro_loss(*(x.double() for x in batch), 0.5), 1e-5)


def test_losses_refuse_shapes_that_would_broadcast_and_impossible_tau():
    s, ref, r, V = random_batch()
    for wrong in (
        (s[:, None], ref, r, V),
        (s, ref, r, V[:1]),
        (s, ref[:, None], r, V),
        (s, ref, r[None], V),
    ):
        with pytest.raises(ValueError, match=r"\[N\]"):
            dro.dro_loss(*wrong, 0.5)
        with pytest.raises(ValueError, match=r"\[N\]"):
            dro.dro_v_losses(*wrong, 0.5)
    with pytest.raises(ValueError, match=r"\[N\]"):
        dro.dro_p_loss(s[:, None], ref[:, None], r[:, None], 0.5)
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tau must be positive"):
            dro.dro_loss(s, ref, r, V, tau)
        with pytest.raises(ValueError, match="tau must be positive"):
            dro.dro_p_loss(s, ref, r, tau)


def test_the_losses_change_nothing_in_place():
    batch = random_batch()
    kept = [x.clone() for x in batch]
    dro.dro_loss(*batch, 0.5), dro.dro_v_losses(*batch, 0.5), dro.dro_p_loss(*batch[:3], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(batch, kept))


# ---------------------------------------------------------------------------------------------------------- frontier curve


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
        assert (
            reward.mean(1)[i - 1] - 1e-9 <= reward_of(optimum, rewards) <= reward.mean(1)[i] + 1e-9
        )
