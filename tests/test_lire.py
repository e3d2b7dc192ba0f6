"""LIRE against its formulas: closed forms, the oracle, invariants, poisoned padding.

At the end stand wrong variants, which must be caught.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from helpers import check_constants, close, gradient, public

import lire

T, S, RAW = 2.0, (-3.0, -5.0, -4.0), (1.0, 0.0, -1.0)
POISON = (math.nan, math.inf, -math.inf, 1e9)
LENGTHS_OF_LISTS = (7, 5, 3, 2, 1)  # B = 5 lists, padded to M = 7


def make_lists(seed=0, padding=0.7):
    """logps, rewards [B, M] in float64 and mask; `padding` stands where there is no candidate."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.tensor(LENGTHS_OF_LISTS)[:, None]
    logps = -6 + 2 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    rewards = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    return logps.masked_fill(~mask, padding), rewards.masked_fill(~mask, padding), mask


def judged(formula, mask, *tensors):
    """The oracle's formula on the real candidates of each list.

    Returns [B] values, or [B, M] with 0 in the padded slots.
    """
    lists = [
        torch.as_tensor(formula(*(tensor[i, real].numpy() for tensor in tensors)))
        for i, real in enumerate(mask)
    ]
    if lists[0].dim() == 0:
        return torch.stack(lists)
    out = torch.zeros(mask.shape, dtype=torch.float64)
    out[mask] = torch.cat(lists)
    return out


# Every function of the file, of one list of arguments.
CALLS = {
    "candidate_probs": lambda logps, lengths, rewards, mask: lire.candidate_probs(logps, mask, T),
    "softmax": lambda logps, lengths, rewards, mask: lire.transform_rewards(
        rewards, mask, "softmax"
    ),
    "zscore": lambda logps, lengths, rewards, mask: lire.transform_rewards(rewards, mask, "zscore"),
    "none": lambda logps, lengths, rewards, mask: lire.transform_rewards(rewards, mask, "none"),
    "lire_loss": lambda logps, lengths, rewards, mask: lire.lire_loss(logps, rewards, mask, T),
    "lire_grad": lambda logps, lengths, rewards, mask: lire.lire_grad(logps, rewards, mask, T),
    "sft_loss": lire.sft_loss,
}
TRANSFORMS = ("softmax", "zscore", "none")
LEARNED = {name: [] if name in TRANSFORMS else ["logps"] for name in CALLS}


def test_every_function_of_the_file_is_called():
    assert public(lire) == set(CALLS) - set(TRANSFORMS) | {"transform_rewards"}


def slopes(logps, R):
    """The gradient of one list's loss by the oracle's finite differences."""
    return oracle.finite_differences(lambda x: oracle.lire_loss(x, R, T), logps)


def one_list(*rows):
    """Lists of numbers as float64 [1, M], and a mask without padding."""
    mask = torch.ones(1, len(rows[0]), dtype=torch.bool)
    return *(torch.tensor([row], dtype=torch.float64) for row in rows), mask


# ------------------------------------------------------------------------------------- closed forms


def test_worked_example_by_hand():
    s, r, mask = one_list(S, RAW)
    Z = math.exp(-3 / 2) + math.exp(-5 / 2) + math.exp(-4 / 2)
    P = [math.exp(-3 / 2) / Z, math.exp(-5 / 2) / Z, math.exp(-4 / 2) / Z]
    close(lire.candidate_probs(s, mask, T), [P])
    close(lire.lire_loss(s, r, mask, T), [-(P[0] - P[2])])
    close(lire.lire_grad(s, r, mask, T), [[-P[j] / 2 * (RAW[j] - (P[0] - P[2])) for j in range(3)]])


def test_worked_example_with_the_softmax_rewards_of_the_released_code():
    s, r, mask = one_list(S, RAW)
    z = math.e + 1 + 1 / math.e
    R = [math.e / z, 1 / z, 1 / (math.e * z)]
    close(lire.transform_rewards(r, mask, "softmax"), [R])
    numerator = math.exp(-3 / 2) * R[0] + math.exp(-5 / 2) * R[1] + math.exp(-4 / 2) * R[2]
    denominator = math.exp(-3 / 2) + math.exp(-5 / 2) + math.exp(-4 / 2)
    loss = lire.lire_loss(s, torch.tensor([R], dtype=torch.float64), mask, T)
    close(loss, [-numerator / denominator])


def test_two_candidates_learn_by_a_tanh_of_the_reward_gap():
    s1, s2, r1, r2 = -2.0, -3.0, 0.4, -1.1
    s, r, mask = one_list((s1, s2), (r1, r2))
    P1 = 1 / (1 + math.exp((s2 - s1) / T))
    g = -(1 / T) * P1 * (1 - P1) * math.tanh((r1 - r2) / 2)
    close(lire.lire_grad(s, lire.transform_rewards(r, mask, "softmax"), mask, T), [[g, -g]])


def test_a_badly_misranked_pair_teaches_nothing():
    s, r, mask = one_list((-200.0, -3.0), (1.0, 0.0))
    assert lire.lire_grad(s, r, mask, T).abs().max() < 1e-40  # DPO's weight would be 1 here


# ----------------------------------------------------------------- values and gradients, the oracle


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0, 11.0])
def test_values_and_gradients_equal_the_oracle(temperature):
    logps, rewards, mask = make_lists(seed=3)
    args = logps, rewards, mask, temperature
    probs = judged(lambda logps: oracle.candidate_probs(logps, temperature), mask, logps)
    loss = judged(lambda logps, R: oracle.lire_loss(logps, R, temperature), mask, logps, rewards)
    slope = judged(lambda logps, R: oracle.lire_grad(logps, R, temperature), mask, logps, rewards)
    close(lire.candidate_probs(logps, mask, temperature), probs)
    close(lire.lire_loss(*args), loss)
    close(gradient(lire.lire_loss, *args), slope)
    close(lire.lire_grad(*args), gradient(lire.lire_loss, *args))


def test_gradient_equals_finite_differences():
    logps, rewards, mask = make_lists(seed=4)
    close(lire.lire_grad(logps, rewards, mask, T), judged(slopes, mask, logps, rewards), 1e-8)
    loss = lambda x: lire.lire_loss(x, rewards, mask, T)
    assert torch.autograd.gradcheck(loss, logps.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logps)


@pytest.mark.parametrize("how", ["softmax", "zscore", "none"])
def test_transformed_rewards_equal_the_oracle(how):
    _, rewards, mask = make_lists(seed=5)
    close(
        lire.transform_rewards(rewards, mask, how),
        judged(lambda rewards: oracle.transform_rewards(rewards, how), mask, rewards),
    )


# --------------------------------------------------------------------------------------- invariants


def test_gradient_sums_to_zero_over_a_list():
    close(lire.lire_grad(*make_lists(), T).sum(-1), [0.0] * 5)


def test_shifts_leave_the_gradient_and_move_the_loss_by_the_reward_shift_alone():
    logps, rewards, mask = make_lists()
    c = torch.tensor([[3.0], [-7.0], [0.5], [11.0], [-2.0]], dtype=torch.float64)
    close(lire.lire_grad(logps + c, rewards + c, mask, T), lire.lire_grad(logps, rewards, mask, T))
    close(lire.lire_loss(logps + c, rewards, mask, T), lire.lire_loss(logps, rewards, mask, T))
    close(
        lire.lire_loss(logps, rewards + c, mask, T),
        lire.lire_loss(logps, rewards, mask, T) - c[:, 0],
    )


def test_nothing_is_learnt_from_equal_rewards_or_a_single_candidate():
    logps, rewards, mask = make_lists()
    equal = torch.full_like(rewards, 0.3)
    close(lire.lire_grad(logps, equal, mask, T), torch.zeros(5, 7))
    close(gradient(lire.lire_loss, logps, equal, mask, T), torch.zeros(5, 7))
    close(lire.lire_grad(logps, rewards, mask, T)[-1], [0.0] * 7)  # the last list has one candidate


def test_order_of_the_candidates_does_not_matter():
    logps, rewards, mask = make_lists()
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    moved = logps[:, order], rewards[:, order], mask[:, order]
    close(lire.lire_loss(*moved, T), lire.lire_loss(logps, rewards, mask, T))
    close(lire.lire_grad(*moved, T), lire.lire_grad(logps, rewards, mask, T)[:, order])


def test_cold_lists_are_one_hot_and_teach_nothing():
    s, r, mask = one_list(S, RAW)
    close(lire.candidate_probs(s, mask, 0.01), [[1.0, 0.0, 0.0]])
    close(lire.lire_grad(s, r, mask, 0.01), [[0.0, 0.0, 0.0]])


def test_cold_gradient_grows_as_one_over_temperature_at_a_tie():
    s, r, mask = one_list((-3.0, -3.0, -5.0), RAW)
    for temperature in (0.1, 0.01):
        grad = temperature * lire.lire_grad(s, r, mask, temperature)
        close(grad, [[-0.25, 0.25, 0.0]], 1e-6)  # -P (R - mean), P = 1/2


def test_hot_lists_are_reinforce_with_the_mean_as_baseline():
    logps, rewards, mask = make_lists()
    hot = 1e8
    reinforce = judged(lambda R: -(R - R.mean()) / len(R), mask, rewards)
    close(hot * lire.lire_grad(logps, rewards, mask, hot), reinforce, 1e-6)


def test_hot_lists_are_leave_one_out_reinforce_times_m_minus_1_over_m():
    s, r, mask = one_list(S, RAW)
    rloo = [-(RAW[j] - sum(RAW[m] for m in range(3) if m != j) / 2) / 3 for j in range(3)]
    close(1e8 * lire.lire_grad(s, r, mask, 1e8), [[2 / 3 * g for g in rloo]], 1e-6)


def test_the_minimum_puts_all_mass_on_the_best_candidate():
    logps, rewards, mask = make_lists()
    best = rewards.masked_fill(~mask, -math.inf).max(-1)
    assert (lire.lire_loss(logps, rewards, mask, T) >= -best.values).all()
    winner = torch.nn.functional.one_hot(best.indices, 7) * 1e3
    close(lire.lire_loss(logps + winner, rewards, mask, T), -best.values)


def test_with_softmax_rewards_the_loss_lies_between_minus_1_and_0():
    logps, rewards, mask = make_lists()
    loss = lire.lire_loss(logps, lire.transform_rewards(rewards, mask, "softmax"), mask, T)
    assert (-1 < loss[:4]).all() and (loss[:4] < 0).all() and loss[4] == -1  # M = 1 gives -1
    wide, R = (50 * make_lists(seed)[0].float() for seed in (1, 2))
    loss = lire.lire_loss(wide, lire.transform_rewards(R, mask, "softmax"), mask, T)
    assert (-1 <= loss).all() and (loss <= 0).all()  # float32 may round to either end


def test_it_is_minimum_risk_training_with_alpha_1_over_temperature():
    logps, rewards, mask = make_lists()
    risk = lambda logps, R: oracle.mrt_risk(np.exp(logps), -R, 1 / T)
    close(lire.lire_loss(logps, rewards, mask, T), judged(risk, mask, logps, rewards))


@pytest.mark.parametrize("tokens, largest", [(5, 0.50), (20, 0.70), (50, 0.81), (128, 0.88)])
def test_sums_over_longer_responses_sharpen_the_list(tokens, largest):
    sums = 1.45 * tokens**0.5 * torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    P = lire.candidate_probs(sums, torch.ones(20_000, 8, dtype=torch.bool), T)
    assert abs(P.max(-1).values.mean().item() - largest) < 0.02


# -------------------------------------------------------------------------- padding, shapes, dtypes


@pytest.mark.parametrize("poison", POISON)
def test_padded_slots_may_hold_anything(poison):
    clean, bad = make_lists(padding=0.0), make_lists(padding=poison)
    for how in ("softmax", "zscore", "none"):
        rewards = lire.transform_rewards(*bad[1:], how)
        assert torch.equal(rewards, lire.transform_rewards(*clean[1:], how))
    for function in (lire.lire_loss, lire.lire_grad, lambda *args: gradient(lire.lire_loss, *args)):
        assert torch.equal(function(*bad, T), function(*clean, T))
    assert (gradient(lire.lire_loss, *bad, T)[~bad[2]] == 0).all()
    assert (lire.candidate_probs(bad[0], bad[2], T)[~bad[2]] == 0).all()


@pytest.mark.parametrize("poison", POISON)
def test_padded_slots_of_the_sft_term_may_hold_anything(poison):
    logps, rewards, mask = make_lists(padding=poison)
    lengths = torch.full((5, 7), 3.0).masked_fill(~mask, 0 if math.isnan(poison) else poison)
    clean, clean_rewards, _ = make_lists()
    assert torch.equal(
        lire.sft_loss(logps, lengths, rewards, mask),
        lire.sft_loss(clean, torch.full((5, 7), 3.0), clean_rewards, mask),
    )
    assert (gradient(lire.sft_loss, logps, lengths, rewards, mask)[~mask] == 0).all()


@pytest.mark.parametrize("poison", (0.0, *POISON))
@pytest.mark.parametrize("name", CALLS)
def test_a_list_without_candidates_gives_0_and_leaves_the_others_their_bits(name, poison):
    logps, rewards, mask = make_lists(padding=poison)
    lengths = torch.arange(2.0, 37.0).view(5, 7).masked_fill(~mask, poison)
    some = torch.tensor([False, True, True, False, True, True, True])  # lists 0 and 3 are empty

    def spread(x, fill):
        return torch.full((7, 7), fill, dtype=x.dtype).masked_scatter(some[:, None], x)

    whole = [spread(x, poison) for x in (logps, lengths, rewards)] + [spread(mask, False)]
    alone = CALLS[name](logps, lengths, rewards, mask)
    out = CALLS[name](*whole)
    assert torch.equal(out[some], alone) and not out[~some].any()
    assert not CALLS[name](*(x[~some] for x in whole)).any()  # no list has a candidate
    if LEARNED[name]:
        squares = lambda *args: CALLS[name](*args).square()
        with torch.autograd.set_detect_anomaly(True):  # refuses nan in every step backward
            slope = gradient(squares, *whole)
        assert torch.equal(slope[some], gradient(squares, logps, lengths, rewards, mask))
        assert not slope[~some].any()


@pytest.mark.parametrize("B, M", [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("name", CALLS)
def test_no_candidates_or_no_lists_give_0_or_nothing(name, B, M):
    shape = (B,) if name.endswith("loss") else (B, M)
    inputs = torch.zeros(B, M), torch.ones(B, M), torch.zeros(B, M), torch.zeros(B, M).bool()
    assert torch.equal(CALLS[name](*inputs), torch.zeros(shape))
    if LEARNED[name]:
        assert gradient(CALLS[name], *inputs).shape == (B, M)


@pytest.mark.parametrize("name", CALLS)
def test_no_gradient_reaches_rewards_and_lengths(name):
    logps, rewards, mask = make_lists()
    inputs = dict(logps=logps, lengths=7 - logps, rewards=rewards, mask=mask)
    check_constants(CALLS[name], LEARNED[name], **inputs)


@pytest.mark.parametrize("name", CALLS)
def test_a_mask_that_is_not_bool_is_refused(name):
    logps, rewards, mask = make_lists()
    for wrong in (mask.float(), mask.long()):
        with pytest.raises(ValueError, match="bool mask"):
            CALLS[name](logps, 7 - logps, rewards, wrong)


def test_a_ragged_list_scores_as_it_does_alone():
    logps, rewards, mask = make_lists()
    for i, M in enumerate(LENGTHS_OF_LISTS):
        alone = logps[i : i + 1, :M], rewards[i : i + 1, :M], mask[i : i + 1, :M]
        close(lire.lire_loss(*alone, T), lire.lire_loss(logps, rewards, mask, T)[i : i + 1])
        for how in ("softmax", "zscore", "none"):
            close(
                lire.transform_rewards(*alone[1:], how),
                lire.transform_rewards(rewards, mask, how)[i : i + 1, :M],
            )


def test_shapes_that_would_broadcast_are_refused():
    logps, rewards, mask = make_lists()
    for wrong in (rewards[:, :1], rewards[:1], rewards[0], rewards.T, rewards[..., None]):
        for call in (
            lambda x: lire.lire_loss(logps, x, mask, T),
            lambda x: lire.lire_loss(x, rewards, mask, T),
            lambda x: lire.lire_grad(logps, x, mask, T),
            lambda x: lire.lire_loss(logps, rewards, x > 0, T),
            lambda x: lire.candidate_probs(x, mask, T),
            lambda x: lire.transform_rewards(x, mask, "none"),
            lambda x: lire.sft_loss(logps, x, rewards, mask),
            lambda x: lire.sft_loss(logps, rewards, x, mask),
        ):
            with pytest.raises(ValueError, match="one shape"):
                call(wrong)
    with pytest.raises(ValueError):
        lire.lire_loss(logps[0], rewards[0], mask[0], T)  # [M] without a batch


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("function", [lire.lire_loss, lire.lire_grad])
def test_temperature_must_be_positive(function, temperature):
    logps, rewards, mask = make_lists()
    with pytest.raises(ValueError, match="temperature must be positive"):
        function(logps, rewards, mask, temperature)
    with pytest.raises(ValueError, match="temperature must be positive"):
        lire.candidate_probs(logps, mask, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logps, rewards, mask = make_lists()
    logps, rewards = logps.to(dtype), rewards.to(dtype)
    loss = lire.lire_loss(logps, rewards, mask, T)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, lire.lire_loss(logps.float(), rewards.float(), mask, T))
    assert gradient(lire.lire_loss, logps, rewards, mask, T).dtype == dtype


@pytest.mark.parametrize("how", ["softmax", "zscore"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rewards_are_transformed_in_float32(dtype, how):
    rewards = torch.tensor([[300.0, -300.0, 100.0], [0.5, 0.25, -1.0]]).to(dtype)
    mask = torch.ones(2, 3, dtype=torch.bool)
    expected = lire.transform_rewards(rewards.double(), mask, how)
    close(lire.transform_rewards(rewards, mask, how).double(), expected, 1e-6)


def test_float64_stays_float64():
    logps, rewards, mask = make_lists()
    assert lire.lire_loss(logps, rewards, mask, T).dtype == torch.float64
    assert lire.lire_grad(logps, rewards, mask, T).dtype == torch.float64
    assert lire.transform_rewards(rewards, mask, "zscore").dtype == torch.float64


def test_inputs_are_not_written_to():
    logps, rewards, mask = make_lists()
    lire.lire_loss(logps, rewards, mask, T), lire.sft_loss(logps, -logps, rewards, mask)
    [lire.transform_rewards(rewards, mask, how) for how in ("softmax", "zscore", "none")]
    assert all(torch.equal(a, b) for a, b in zip((logps, rewards, mask), make_lists()))


# ------------------------------------------------------------------------- rewards and the SFT term


def test_zscored_rewards_have_mean_0_and_deviation_1_and_keep_their_order():
    r, mask = one_list((1.0, 4.0, 7.0))
    close(lire.transform_rewards(r, mask, "zscore"), [[-math.sqrt(3 / 2), 0.0, math.sqrt(3 / 2)]])


@pytest.mark.parametrize("M", [1, 3, 7, 11])
@pytest.mark.parametrize("value", [0.0, 0.1, -2.7, 1e6])
def test_zscore_of_equal_rewards_is_0(value, M):
    rewards, mask = torch.full((1, M), value), torch.ones(1, M, dtype=torch.bool)
    close(lire.transform_rewards(rewards, mask, "zscore"), torch.zeros(1, M))


@pytest.mark.parametrize("exponent", range(-30, 31, 5))
def test_zscores_are_the_same_at_every_scale(exponent):
    """In float32, where squares overflow above 1e19 and vanish below 1e-22."""
    lists = [
        [1.0, 4.0, 7.0, -2.0, 0.5],
        [1.0, 2.0, 3.0, 5.0, 1e6],  # one far away
        [-3.0, -3.0, -3.0, 1e-3, -3.0],
        [0.7] * 5,
        [7.0],
    ]
    mask = torch.arange(5) < torch.tensor([len(row) for row in lists])[:, None]
    rows = torch.tensor([row + [math.nan] * (5 - len(row)) for row in lists], dtype=torch.float64)
    rewards = (rows * 10.0**exponent).float()
    judge = lambda rewards: oracle.transform_rewards(rewards, "zscore")
    expected = judged(judge, mask, rewards.double())
    close(lire.transform_rewards(rewards, mask, "zscore"), expected, 1e-6)


def test_softmax_rewards_ignore_a_shift_and_survive_large_numbers():
    r, mask = one_list(RAW)
    expected = lire.transform_rewards(r, mask, "softmax")
    close(lire.transform_rewards(r + 1e4, mask, "softmax"), expected)


def test_an_unknown_reward_transform_is_refused():
    with pytest.raises(ValueError, match="ranks"):
        lire.transform_rewards(*one_list(RAW), "ranks")


def test_sft_loss_is_the_mean_per_token_of_the_best_response():
    logps, rewards, mask = make_lists(seed=6)
    lengths = torch.arange(2, 37).view(5, 7)
    close(
        lire.sft_loss(logps, lengths, rewards, mask),
        judged(oracle.sft_loss, mask, logps, lengths, rewards),
    )
    s, r, mask = one_list((-6.0, -10.0, -4.0), (0.0, 1.0, -1.0))
    close(lire.sft_loss(s, torch.tensor([[2, 5, 3]]), r, mask), [10 / 5])


def test_sft_loss_takes_the_first_of_equally_good_responses():
    s, r, mask = one_list((-6.0, -10.0, -4.0), (0.0, 1.0, 1.0))
    lengths = torch.tensor([[2, 5, 3]])
    close(lire.sft_loss(s, lengths, r, mask), [10 / 5])
    close(gradient(lire.sft_loss, s, lengths, r, mask), [[0.0, -1 / 5, 0.0]])


# ----------------------------------------------------------------- the tests above are able to fail


def disagreement(loss):
    """Largest distance of a loss, in value or gradient, from the oracle."""
    logps, rewards, mask = make_lists(seed=7)
    value = judged(lambda logps, R: oracle.lire_loss(logps, R, T), mask, logps, rewards)
    slope = judged(slopes, mask, logps, rewards)
    wrong = loss(logps, rewards, mask, T).broadcast_to(value.shape) - value
    wrong_slope = gradient(loss, logps, rewards, mask, T) - slope
    return max(wrong.abs().max().item(), wrong_slope.abs().max().item())


def softmax(x, mask, dim=-1):
    return torch.where(mask, x.masked_fill(~mask, -torch.inf).softmax(dim), 0.0)


def with_gradient(wrong):
    """The right value with the gradient of `wrong`."""

    def loss(*args):
        return wrong(*args) + (lire.lire_loss(*args) - wrong(*args)).detach()

    return loss


def reward_weighted(baseline):
    """A surrogate whose gradient is -(1/T) P_j (R_j - baseline)."""

    def surrogate(logps, R, mask, T):
        weights = softmax(logps / T, mask) * (R - baseline(logps, R, mask))
        return -(weights.detach() * logps / T * mask).sum(-1)

    return with_gradient(surrogate)


WRONG = {
    "mean for sum": lambda logps, R, mask, T: lire.lire_loss(logps, R, mask, T) / mask.sum(-1),
    "divided by the padded M": lambda logps, R, mask, T: (
        lire.lire_loss(logps, R, mask, T) / mask.shape[-1]
    ),
    "summed over the batch": lambda logps, R, mask, T: lire.lire_loss(logps, R, mask, T).sum(),
    "swapped sign": lambda logps, R, mask, T: -lire.lire_loss(logps, R, mask, T),
    "swapped sign in the gradient alone": with_gradient(
        lambda logps, R, mask, T: -lire.lire_loss(logps, R, mask, T)
    ),
    "swapped sign of the scores": lambda logps, R, mask, T: lire.lire_loss(-logps, R, mask, T),
    "times temperature instead of divided": lambda logps, R, mask, T: lire.lire_loss(
        logps, R, mask, 1 / T
    ),
    "no temperature": lambda logps, R, mask, T: lire.lire_loss(logps, R, mask, 1.0),
    "temperature after the softmax": lambda logps, R, mask, T: (
        -(softmax(logps, mask) / T * R).sum(-1)
    ),
    "gradient without 1/T": with_gradient(
        lambda logps, R, mask, T: T * lire.lire_loss(logps, R, mask, T)
    ),
    "missing mask": lambda logps, R, mask, T: -((logps / T).softmax(-1) * R).sum(-1),
    "padded slot counted in the normaliser": lambda logps, R, mask, T: (
        -((logps / T).softmax(-1) * R * mask).sum(-1)
    ),
    "padded log-probs set to 0": lambda logps, R, mask, T: (
        -((logps * mask / T).softmax(-1) * R * mask).sum(-1)
    ),
    "un-normalised softmax": lambda logps, R, mask, T: -((logps / T).exp() * mask * R).sum(-1),
    "softmax over the batch axis": lambda logps, R, mask, T: (
        -(softmax(logps / T, mask, dim=0) * R).sum(-1)
    ),
    "one softmax over the whole batch": lambda logps, R, mask, T: (
        -(softmax((logps / T).flatten(), mask.flatten()).view_as(logps) * R).sum(-1)
    ),
    "log P for P": lambda logps, R, mask, T: (
        -(softmax(logps / T, mask).clamp_min(1e-9).log() * R * mask).sum(-1)
    ),
    "softmax taken twice": lambda logps, R, mask, T: (
        -(softmax(softmax(logps / T, mask), mask) * R).sum(-1)
    ),
    "likelihood of the best response": lambda logps, R, mask, T: (
        -softmax(logps / T, mask).gather(-1, R.masked_fill(~mask, -9).argmax(-1, True)).squeeze(-1)
    ),
    "rewards softmaxed unasked": lambda logps, R, mask, T: (
        -(softmax(logps / T, mask) * softmax(R, mask)).sum(-1)
    ),
    "rewards and scores exchanged": lambda logps, R, mask, T: (
        -(softmax(R / T, mask) * logps).sum(-1)
    ),
    "rewards of the next list": lambda logps, R, mask, T: lire.lire_loss(
        logps, R.roll(1, 0), mask, T
    ),
    "no gradient": with_gradient(
        lambda logps, R, mask, T: torch.where(mask, logps.detach(), logps).sum(-1)
    ),
    "gradient without a baseline": reward_weighted(lambda logps, R, mask: 0.0),
    "plain mean as the baseline": reward_weighted(
        lambda logps, R, mask: (R * mask).sum(-1, True) / mask.sum(-1, True)
    ),
}


def test_the_right_loss_agrees_with_the_oracle():
    assert disagreement(lire.lire_loss) < 1e-8
    own_mean = lambda logps, R, mask: (softmax(logps / T, mask) * R).sum(-1, True)
    assert disagreement(reward_weighted(own_mean)) < 1e-8


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_is_caught(name):
    assert disagreement(WRONG[name]) > 1e-2
