"""DRO's optimum and losses: closed forms, the oracle, invariances."""

import math

import oracle
import pytest
import torch
from helpers import (
    REF,
    REWARDS,
    check_constants,
    close,
    gradient,
    gradients,
    problem,
    public,
    tensors,
)

import dro

# -------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_value_and_policy_by_hand(tau):
    V = tau * math.log(0.5 * math.exp(1 / tau) + 0.3 + 0.2 * math.exp(-1 / tau))
    pi = [0.5 * math.exp((1 - V) / tau), 0.3 * math.exp(-V / tau), 0.2 * math.exp((-1 - V) / tau)]
    close(dro.optimal_value(*tensors(), tau), [V])
    close(dro.optimal_logps(*tensors(), tau).exp(), [pi])


@pytest.mark.parametrize("tau", [0.1, 0.7, 3.0])
def test_value_policy_and_kl_equal_the_oracle(tau):
    ref_logps, rewards = problem()
    value = dro.optimal_value(ref_logps, rewards, tau)
    logps = dro.optimal_logps(ref_logps, rewards, tau)
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
    ratios = dro.optimal_logps(ref_logps, rewards, tau) - ref_logps
    close(rewards - V - tau * ratios, torch.zeros(5, 7))


def test_a_constant_added_to_a_prompts_rewards_moves_its_value_and_leaves_the_policy():
    ref_logps, rewards = problem()
    c = torch.tensor([[3.0], [-7.0], [0.0], [11.0], [0.5]], dtype=torch.float64)
    value = dro.optimal_value(ref_logps, rewards, 0.7)
    logps = dro.optimal_logps(ref_logps, rewards, 0.7)
    close(dro.optimal_value(ref_logps, rewards + c, 0.7), value + c[:, 0])
    close(dro.optimal_logps(ref_logps, rewards + c, 0.7), logps)


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_rewards_times_c_are_tau_over_c(c):
    ref_logps, rewards = problem()
    value = dro.optimal_value(ref_logps, rewards, 0.7 / c)
    logps = dro.optimal_logps(ref_logps, rewards, 0.7 / c)
    close(dro.optimal_logps(ref_logps, c * rewards, 0.7), logps)
    close(dro.optimal_value(ref_logps, c * rewards, 0.7), c * value)


def test_small_tau_is_greedy_and_large_tau_is_the_reference():
    ref_logps, rewards = tensors()
    close(dro.optimal_value(ref_logps, rewards, 1e-6), [1.0], 1e-5)
    close(dro.optimal_logps(ref_logps, rewards, 1e-6).exp(), [[1.0, 0.0, 0.0]])
    close(dro.optimal_value(ref_logps, rewards, 1e6), [0.5 - 0.2], 1e-5)
    close(dro.optimal_logps(ref_logps, rewards, 1e6).exp(), [REF], 1e-5)


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
            lambda x: dro.optimal_value(ref_logps, x, 1.0),
            lambda x: dro.optimal_logps(x, rewards, 1.0),
            lambda x: dro.kl_divergence(ref_logps, x),
        ):
            with pytest.raises(ValueError, match="one shape"):
                call(wrong)
    for tau in (0.0, -1.0, math.nan):
        for function in (dro.optimal_value, dro.optimal_logps):
            with pytest.raises(ValueError, match="tau must be positive"):
                function(ref_logps, rewards, tau)


@pytest.mark.parametrize("B, M", [(2, 0), (0, 3), (0, 0)])
def test_an_empty_set_of_responses_has_no_optimum_and_no_prompts_have_none(B, M):
    empty = torch.zeros(B, M)
    assert torch.equal(dro.kl_divergence(empty, empty), torch.zeros(B))
    for function, shape in ((dro.optimal_value, (B,)), (dro.optimal_logps, (B, M))):
        if M:
            assert function(empty, empty, 1.0).shape == shape
        else:
            with pytest.raises(ValueError, match="at least one response"):
                function(empty, empty, 1.0)


# ------------------------------------------------------------------------------------------- losses


def flat(*rows, dtype=torch.float64):
    return [torch.tensor(row, dtype=dtype) for row in rows]


# logps, ref_logps, rewards, values
BATCH = flat((-3.0, -5.0), (-3.5, -4.2), (1.0, -0.5), (0.2, 0.1))


# One side of a loss each: what it teaches, and the call.
LOSSES = {
    "dro_loss": (["logps", "values"], dro.dro_loss),
    "dro_v_losses, policy": (["logps"], lambda *args: dro.dro_v_losses(*args)[0]),
    "dro_v_losses, value": (["values"], lambda *args: dro.dro_v_losses(*args)[1]),
    "dro_p_loss": (
        ["logps"],
        lambda logps, ref_logps, rewards, values, tau: dro.dro_p_loss(
            logps, ref_logps, rewards, tau
        ),
    ),
}


def test_every_function_of_the_file_is_called():
    optimum = {"optimal_value", "optimal_logps", "kl_divergence"}
    assert public(dro) == {name.partition(",")[0] for name in LOSSES} | optimum


def random_batch(N=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_losses_and_gradients_by_hand(tau):
    logps, ref_logps, rewards, values = BATCH
    residual = [1.0 - 0.2 - tau * (-3.0 + 3.5), -0.5 - 0.1 - tau * (-5.0 + 4.2)]
    close(dro.dro_loss(*BATCH, tau), [d * d / 2 for d in residual])
    policy, value = dro.dro_v_losses(*BATCH, tau)
    close(value, [d * d / 2 for d in residual])
    close(policy, [3.0 * 0.8 + tau / 2 * 0.25, 5.0 * -0.6 + tau / 2 * 0.64])
    losses = lambda logps, V: dro.dro_v_losses(logps, ref_logps, rewards, V, tau)
    by_policy = gradients(lambda logps, V: losses(logps, V)[0].mean(), logps, values)[0]
    by_value = gradients(lambda logps, V: losses(logps, V)[1].mean(), logps, values)[1]
    close(by_policy, [-d / 2 for d in residual])
    close(by_value, [-d / 2 for d in residual])
    close(dro.dro_loss(*BATCH, tau).mean(), {0.5: 0.085625, 5.0: 3.6125}[tau])


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_losses_equal_the_oracle_and_finite_differences(tau):
    logps, ref, rewards, V = random_batch()
    judged = oracle.dro_loss(*(x.numpy() for x in (logps, ref, rewards, V)), tau)
    close(dro.dro_loss(logps, ref, rewards, V, tau), judged)
    judge_p = lambda x: oracle.dro_p_loss(x, ref.numpy(), rewards.numpy(), tau)
    close(dro.dro_p_loss(logps, ref, rewards, tau), judge_p(logps.numpy()))

    joint = lambda x, V: oracle.dro_loss(x, ref.numpy(), rewards.numpy(), V, tau).mean()
    by_logps = oracle.finite_differences(lambda x: joint(x, V.numpy()), logps.numpy())
    by_V = oracle.finite_differences(lambda x: joint(logps.numpy(), x), V.numpy())
    loss = lambda x, V: dro.dro_loss(x, ref, rewards, V, tau).mean()
    grads = gradients(loss, logps, V)
    close(grads[0], by_logps, 1e-7)
    close(grads[1], by_V, 1e-7)

    # One backward through the sum of DRO-V's losses serves both networks.
    losses = lambda x, V: sum(part.mean() for part in dro.dro_v_losses(x, ref, rewards, V, tau))
    policy, value = gradients(losses, logps, V)
    close(policy, by_logps / tau, 1e-7)  # Eq. 8: that of the joint loss over tau
    close(value, by_V, 1e-7)

    spread = oracle.finite_differences(judge_p, logps.numpy())
    close(gradients(lambda x: dro.dro_p_loss(x, ref, rewards, tau), logps)[0], spread, 1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_reference_and_rewards(name):
    learned, loss = LOSSES[name]
    call = lambda logps, ref_logps, rewards, values: loss(logps, ref_logps, rewards, values, 0.5)
    names = "logps", "ref_logps", "rewards", "values"
    check_constants(call, learned, **dict(zip(names, random_batch())))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LOSSES)
def test_no_responses_give_nothing_or_0(name):
    empty = [torch.zeros(0) for _ in range(4)]
    learned, loss = LOSSES[name]
    shape = () if name == "dro_p_loss" else (0,)
    assert torch.equal(loss(*empty, 0.5), torch.zeros(shape))
    if "logps" in learned:
        assert gradient(loss, *empty, 0.5).shape == (0,)


def test_each_side_is_blind_to_the_other():
    logps, ref, rewards, V = random_batch()
    losses = lambda x, V: dro.dro_v_losses(x, ref, rewards, V, 0.5)
    policy = gradients(lambda x, V: losses(x, V)[0], logps, V)
    value = gradients(lambda x, V: losses(x, V)[1], logps, V)
    assert policy[1] is None and value[0] is None


def descend(coefficient, tau, mu, steps=15_000, lr=0.2):
    """Gradient descent on exact expectations over three responses: KL(pi*, pi) at the end, or nan.

    coefficient: of the squared log-ratio in the policy's loss; tau/2 in Eq. 8 over tau, 1/2 in the
    box of Algorithm 1.
    """
    ref, r, mu = (torch.tensor(row).double() for row in (REF, REWARDS, mu))
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
    """The paper prints 1/2; Eq. 8 over tau gives tau/2, which ends at pi*.

    The numbers are those of METHODS' prototype.
    """
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
    within = [dro.dro_p_loss(*row, tau) for row in zip(optimum, ref_logps, rewards)]
    close(torch.stack(within), torch.zeros(5))
    V = dro.optimal_value(ref_logps, rewards, tau)
    together = dro.dro_p_loss(optimum.flatten(), ref_logps.flatten(), rewards.flatten(), tau)
    # What is left at pi* is the variance of V*, so pi* is not the minimum.
    close(together, 0.5 * V.var(correction=0))


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
    losses = [dro.dro_loss(*batch, 0.5), *dro.dro_v_losses(*batch, 0.5)]
    for loss in (*losses, dro.dro_p_loss(*batch[:3], 0.5)):
        assert loss.dtype == torch.float32
    close(dro.dro_loss(*batch, 0.5), dro.dro_loss(*(x.double() for x in batch), 0.5), 1e-5)


def test_losses_refuse_shapes_that_would_broadcast_and_impossible_tau():
    s, ref, r, V = random_batch()
    wrongs = [(s[:, None], ref, r, V), (s, ref, r, V[:1])]
    for wrong in (*wrongs, (s, ref[:, None], r, V), (s, ref, r[None], V)):
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
            dro.dro_v_losses(s, ref, r, V, tau)
        with pytest.raises(ValueError, match="tau must be positive"):
            dro.dro_p_loss(s, ref, r, tau)


def test_the_losses_change_nothing_in_place():
    batch = random_batch()
    kept = [x.clone() for x in batch]
    dro.dro_loss(*batch, 0.5), dro.dro_v_losses(*batch, 0.5), dro.dro_p_loss(*batch[:3], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(batch, kept))
