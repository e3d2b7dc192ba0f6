"""What the papers compare with, against the oracle and by hand."""

import collections
import math
import types

import numpy as np
import oracle
import pytest
import torch
from helpers import REF, REWARDS, check_constants, gradient, gradients, public

import baselines
import dro
import lire

# ------------------------------------------------------------------------------------------- single

L, GOOD, MISMATCHED = (0.5, -0.8, 1.2, 0.1), (True, False, True, False), (-0.4, 0.9, 0.2, 0.1)


def kto(ratios=L, good=GOOD, mismatched=MISMATCHED, beta=0.1, ref=-3.0, dtype=torch.float64):
    ratios, other = torch.tensor(ratios, dtype=dtype), torch.tensor(mismatched, dtype=dtype)
    refs, other_refs = torch.full_like(ratios, ref), torch.full_like(other, -1.0)
    return baselines.kto_loss(ratios + ref, refs, torch.tensor(good), other - 1.0, other_refs, beta)


def test_kto_by_hand_and_known_values():
    z = 0.1 * (-0.4 + 0.9 + 0.2 + 0.1) / 4
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    expected = [
        1 - sigmoid(0.05 - z),
        1 - sigmoid(z + 0.08),
        1 - sigmoid(0.12 - z),
        1 - sigmoid(z - 0.01),
    ]
    assert kto().tolist() == pytest.approx(expected, abs=1e-12)
    assert kto().mean().item() == pytest.approx(0.485011, abs=1e-6)
    known = [0.182426, 0.006693, 0.006693, 0.377541]
    assert kto(beta=5.0).tolist() == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("mismatched", [MISMATCHED, (-2.0, -1.0), ()])
def test_kto_equals_the_oracle(beta, mismatched):
    expected = oracle.kto_loss(L, GOOD, mismatched or (0.0,), beta).tolist()
    assert kto(beta=beta, mismatched=mismatched).tolist() == pytest.approx(expected, abs=1e-12)


def test_kto_pushes_the_desirable_up_and_the_others_down_and_z_has_no_gradient():
    logps, other = (torch.randn(count, dtype=torch.float64) for count in (4, 3))
    zeros, other_refs = torch.zeros_like(logps), torch.full_like(other, -9.0)
    loss = lambda x, other: baselines.kto_loss(x, zeros, torch.tensor(GOOD), other, other_refs, 1.0)
    by_logps, by_other = gradients(loss, logps, other)
    assert (torch.sign(-by_logps) == torch.tensor([1, -1, 1, -1])).all() and by_other is None


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_kto_refuses_impossible_beta(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        kto(beta=beta)


def test_kto_refuses_shapes_that_would_broadcast_and_labels_that_are_no_bools():
    s, good = torch.zeros(4), torch.tensor(GOOD)
    wrongs = [(s[:, None], s, good), (s, s[:1], good), (s, s, good[:, None])]
    for wrong in (*wrongs, (s, s, good.float())):
        with pytest.raises(ValueError, match="expected logps"):
            baselines.kto_loss(*wrong, s, s, 1.0)
    with pytest.raises(ValueError, match="mismatched"):
        baselines.kto_loss(s, s, good, s, s[:1], 1.0)


def test_kto_computes_half_precision_in_float32():
    loss = kto(dtype=torch.bfloat16, ref=0.0)
    assert loss.dtype == torch.float32


# -------------------------------------------------------------------------------------------- pairs


def pairs(*ratios, dtype=torch.float64):
    """Chosen and rejected log-probs, and the reference's, for (chosen, rejected) log-ratios."""
    chosen, rejected = (torch.tensor(x, dtype=dtype) for x in zip(*ratios))
    return chosen - 3, rejected - 4, torch.full_like(chosen, -3), torch.full_like(chosen, -4)


RATIOS = (0.7, -0.4), (-1.3, 0.2), (0.0, 0.0)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", ["dpo_loss", "ipo_loss"])
def test_pair_losses_equal_the_oracle_and_finite_differences(name, beta):
    loss, judge = getattr(baselines, name), getattr(oracle, name)
    judged = [judge(*pair, beta) for pair in RATIOS]
    assert loss(*pairs(*RATIOS), beta).tolist() == pytest.approx(judged, abs=1e-12)
    chosen, rejected, *ref = pairs(*RATIOS)
    slopes = gradients(lambda *logps: loss(*logps, *ref, beta), chosen, rejected)
    for pair, by_chosen, by_rejected in zip(RATIOS, *(slope.tolist() for slope in slopes)):
        expected = oracle.finite_differences(lambda x: judge(x[0], x[1], beta), pair)
        assert [by_chosen, by_rejected] == pytest.approx(expected.tolist(), abs=1e-8)


def test_dpo_at_no_margin_is_log_2_and_its_pull_fades_where_the_pair_is_ordered():
    assert baselines.dpo_loss(*pairs((0.0, 0.0)), 0.3).item() == pytest.approx(math.log(2))
    chosen, *rest = pairs((0.0, 0.0), (40.0, 0.0), (-40.0, 0.0))
    slope = gradient(baselines.dpo_loss, chosen, *rest, 1.0)
    assert slope.tolist() == pytest.approx([-1 / 2, -1 / (1 + math.exp(40)), -1], abs=1e-12)


def test_ipo_is_zero_at_its_margin_and_pulls_back_beyond_it():
    chosen, *rest = pairs((5.0, 0.0), (6.0, 0.0), (4.0, 0.0))
    loss = baselines.ipo_loss(chosen, *rest, 0.1)  # margin 1 / (2 * 0.1) = 5
    slope = gradient(baselines.ipo_loss, chosen, *rest, 0.1)
    assert loss.tolist() == pytest.approx([0, 1, 1])
    assert slope.tolist() == pytest.approx([0, 2, -2])


def test_slic_is_a_hinge_on_sums_without_a_reference():
    chosen, rejected = torch.tensor([-2.0, -2.0, -9.0]), torch.tensor([-2.5, -9.0, -2.0])
    assert baselines.slic_loss(chosen, rejected).tolist() == [0.5, 0.0, 8.0]
    judged = [oracle.slic_loss(a, b, 2.5) for a, b in zip(chosen.tolist(), rejected.tolist())]
    assert baselines.slic_loss(chosen, rejected, 2.5).tolist() == pytest.approx(judged)


@pytest.mark.parametrize("name", ["dpo_loss", "ipo_loss"])
def test_pair_losses_refuse_other_shapes_and_strengths(name):
    loss, good = getattr(baselines, name), pairs(*RATIOS)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            loss(*good, beta)
    for k in range(4):
        wrong = [tensor[:, None] if i == k else tensor for i, tensor in enumerate(good)]
        with pytest.raises(ValueError, match=r"expected \[N\]"):
            loss(*wrong, 1.0)


def test_slic_refuses_other_shapes_and_margins():
    with pytest.raises(ValueError, match="delta must be positive"):
        baselines.slic_loss(torch.zeros(2), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match=r"expected \[N\]"):
        baselines.slic_loss(torch.zeros(2), torch.zeros(2, 1))


# -------------------------------------------------------------------------------------------- lists

# Log-probs, reference log-probs, lengths, rewards: five lists of 1 to 5, a tie in two of them.
LISTS = [
    ((-3.0, -5.0, -1.0), (-2.5, -5.5, -4.0), (3, 2, 4), (0.1, 2.0, -1.0)),
    ((-3.0,), (-2.0,), (2,), (1.0,)),
    ((-6.0, -2.0), (-5.0, -3.0), (5, 1), (1.0, 3.0)),
    ((-1.0, -2.2, -3.9, -4.0, -5.0), (-2.0,) * 5, (1, 2, 3, 1, 7), (0.0, 0.5, 0.5, 2.0, 1.0)),
    ((-4.0, -2.0), (-4.0, -4.0), (2, 2), (1.0, 1.0)),
]


def judge_plackett_luce(logps, ref, lengths, rewards):
    return oracle.plackett_luce_loss(np.array(logps) - np.array(ref), rewards, 0.7)


JUDGES = {
    "plackett_luce_loss": judge_plackett_luce,
    "rrhf_loss": lambda logps, ref, *rest: oracle.rrhf_loss(logps, *rest),
    "pro_loss": lambda logps, ref, *rest: oracle.pro_loss(logps, *rest),
    "rwr_loss": lambda logps, ref, lengths, rewards: oracle.rwr_loss(logps, rewards, 0.7),
}


def padded(padding=0.0, dtype=torch.float64):
    """(logps, ref_logps, lengths, rewards [5, 6], mask), padding in the slots that are not real."""
    mask = torch.tensor([[j < len(row[0]) for j in range(6)] for row in LISTS])
    fill = lambda row: list(row) + [padding] * (6 - len(row))
    return *(torch.tensor([fill(row[k]) for row in LISTS], dtype=dtype) for k in range(4)), mask


def list_loss(name, logps, ref_logps, lengths, rewards, mask):
    if name == "plackett_luce_loss":
        return baselines.plackett_luce_loss(logps, ref_logps, rewards, mask, 0.7)
    if name == "rwr_loss":
        return baselines.rwr_loss(logps, rewards, mask, 0.7)
    return getattr(baselines, name)(logps, lengths, rewards, mask)


@pytest.mark.parametrize("padding", [0.0, 1e9, -1e9, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", JUDGES)
def test_list_losses_and_gradients_equal_the_oracle_whatever_the_padding_holds(name, padding):
    logps, *rest = padded(padding)
    judge, judged = JUDGES[name], [JUDGES[name](*row) for row in LISTS]
    assert list_loss(name, logps, *rest).tolist() == pytest.approx(judged, abs=1e-10)
    slopes = gradient(lambda *args: list_loss(name, *args), logps, *rest)
    for (logps, *others), grad in zip(LISTS, slopes):
        expected = oracle.finite_differences(lambda x, others=others: judge(x, *others), logps)
        assert grad[: len(expected)].tolist() == pytest.approx(expected.tolist(), abs=1e-7)
        assert not grad[len(expected) :].any()


@pytest.mark.parametrize("name", JUDGES)
def test_list_losses_follow_the_candidates_wherever_they_stand(name):
    *tensors, mask = padded()
    order = torch.tensor([5, 4, 3, 2, 0, 1])
    plain = list_loss(name, *tensors, mask)
    moved = list_loss(name, *(tensor[:, order] for tensor in (*tensors, mask)))
    unlike = [len(set(row[3])) == len(row[3]) for row in LISTS]  # ties are ranked as they stand
    assert moved[unlike].tolist() == pytest.approx(plain[unlike].tolist())


def test_plackett_luce_of_two_is_dpo_and_of_equals_is_the_number_of_orders():
    s, ref = torch.tensor([[-3.0, -5.0]]), torch.tensor([[-2.5, -5.5]])
    both = torch.ones(1, 2, dtype=torch.bool)
    pair = baselines.dpo_loss(s[:, 1], s[:, 0], ref[:, 1], ref[:, 0], 0.7)
    ranked = baselines.plackett_luce_loss(s, ref, torch.tensor([[0, 9]]), both, 0.7)
    assert ranked.tolist() == pytest.approx(pair.tolist())
    zeros = torch.zeros(1, 5)
    equal = baselines.plackett_luce_loss(zeros, zeros, torch.arange(5)[None], zeros == 0, 1.0)
    assert equal.item() == pytest.approx(math.log(math.factorial(5)), rel=1e-6)


def test_plackett_luce_is_finite_where_log_ratios_are_huge():
    logps, rewards = torch.tensor([[-2000.0, -5.0, 0.0]]), torch.arange(3)[None]
    rest = torch.zeros_like(logps), rewards, torch.ones(1, 3, dtype=torch.bool), 5.0
    assert gradient(baselines.plackett_luce_loss, logps, *rest).isfinite().all()


def test_rrhf_and_pro_divide_by_the_lengths_and_do_nothing_for_a_single_response():
    one, two = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    single = torch.tensor([[-4.0]]), torch.tensor([[3]]), torch.tensor([[1.0]]), one
    for loss in (baselines.rrhf_loss, baselines.pro_loss):
        assert loss(*single).item() == 0
    s, r = torch.tensor([[-4.0, -6.0]]), torch.tensor([[0.0, 2.0]])
    unlike, alike = torch.tensor([[4, 3]]), torch.tensor([[2, 3]])  # alike: -2 a token each
    assert baselines.rrhf_loss(s, unlike, r, two).item() == pytest.approx(-1 + 2)
    assert baselines.rrhf_loss(s, alike, r, two).item() == 0  # a tie costs nothing
    expected = math.log(1 + math.exp(2 * (2 - 1)))
    assert baselines.pro_loss(s, unlike, r, two).item() == pytest.approx(expected)


@pytest.mark.parametrize("M", [1, 2, 3, 7])
def test_reward_weighted_likelihood_is_least_at_its_target_and_nears_the_optimum(M):
    (ref, rewards), tau = (torch.tensor(row, dtype=torch.float64) for row in (REF, REWARDS)), 0.5
    target = torch.tensor(oracle.rwr_target(REF, REWARDS, tau, M))
    assert target.sum().item() == pytest.approx(1)
    # The gradient of the expected loss, over every list that can be drawn, in the target's logits.
    lists = torch.cartesian_prod(*[torch.arange(3)] * M).view(-1, M)
    chances, mask = ref[lists].prod(-1), torch.ones(len(lists), M, dtype=torch.bool)
    expected = lambda logits: (
        chances * baselines.rwr_loss(logits.log_softmax(-1)[lists], rewards[lists], mask, tau)
    )
    assert gradients(expected, target.log())[0].abs().max() < 1e-12
    assert gradients(expected, ref.log())[0].abs().max() > 0.01 or M == 1
    # KL to the reference: none for plain likelihood, never more than log M; nearer to pi*.
    kl = oracle.kl(target.numpy(), REF)
    assert kl == pytest.approx(0, abs=1e-12) if M == 1 else 0 < kl < math.log(M)
    optimum = dro.optimal_logps(ref.log()[None], rewards[None], tau)[0].exp().numpy()
    before = oracle.kl(optimum, oracle.rwr_target(REF, REWARDS, tau, max(M - 1, 1)))
    assert oracle.kl(optimum, target.numpy()) < before or M == 1
    assert oracle.kl(optimum, oracle.rwr_target(REF, REWARDS, tau, 9)) < 0.01


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_reward_weighted_likelihood_refuses_impossible_tau(tau):
    *_, mask = padded()
    with pytest.raises(ValueError, match="tau must be positive"):
        baselines.rwr_loss(torch.zeros(5, 6), torch.zeros(5, 6), mask, tau)


@pytest.mark.parametrize("name", JUDGES)
def test_list_losses_refuse_other_shapes_and_masks(name):
    good = padded()
    for k in (0, 3, 4):
        wrong = [tensor[:, :1] if i == k else tensor for i, tensor in enumerate(good)]
        with pytest.raises(ValueError, match=r"expected \[B, M\]"):
            list_loss(name, *wrong)
    with pytest.raises(ValueError, match="bool mask"):
        list_loss(name, *good[:4], good[4].float())


def test_half_precision_is_computed_in_float32():
    *half, mask = padded(dtype=torch.bfloat16)
    for name in JUDGES:
        assert list_loss(name, *half, mask).dtype == torch.float32
    assert baselines.dpo_loss(*pairs(*RATIOS, dtype=torch.bfloat16), 1.0).dtype == torch.float32


# ------------------------------------------------------------------------------- of every function

SINGLE = ("logps", "ref_logps", "desirable", "mismatched_logps", "mismatched_ref_logps")
PAIR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
LIST = ("logps", "ref_logps", "lengths", "rewards", "mask")
# By name: the arguments that are tensors, those that learn, and what else it takes.
FUNCTIONS = {
    "kto_loss": (SINGLE, SINGLE[:1], (0.7,)),
    "dpo_loss": (PAIR, PAIR[:2], (0.7,)),
    "ipo_loss": (PAIR, PAIR[:2], (0.7,)),
    "slic_loss": (PAIR[:2], PAIR[:2], (7.0,)),
    "plackett_luce_loss": (("logps", "ref_logps", "rewards", "mask"), LIST[:1], (0.7,)),
    "rrhf_loss": (("logps", "lengths", "rewards", "mask"), LIST[:1], ()),
    "pro_loss": (("logps", "lengths", "rewards", "mask"), LIST[:1], ()),
    "rwr_loss": (("logps", "rewards", "mask"), LIST[:1], (0.7,)),
}


def call(name, **inputs):
    names, _, rest = FUNCTIONS[name]
    return getattr(baselines, name)(*(inputs[name] for name in names), *rest)


def test_every_function_of_the_file_is_called():
    assert public(baselines) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_reach_the_policys_log_probs_alone(name):
    names, learned, _ = FUNCTIONS[name]
    numbers = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = dict(zip(LIST, padded()) if name in JUDGES else zip(names, numbers))
    if name == "kto_loss":
        inputs["desirable"] = inputs["desirable"] > 0
        inputs["mismatched_logps"] = inputs["mismatched_ref_logps"] + 1.0  # z > 0
    inputs = {name: inputs[name] for name in names}
    check_constants(lambda **inputs: call(name, **inputs), learned, **inputs)


@pytest.mark.parametrize("B, M", [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_to_compare_gives_0_or_nothing(name, B, M):
    """Lists [B, M]; of pairs and single responses N = 0, and M mismatched ones."""
    names, learned, _ = FUNCTIONS[name]
    if name in JUDGES:
        inputs = {name: torch.zeros(B, M) for name in names}
        inputs["mask"] = inputs["mask"].bool()
    else:
        inputs = {name: torch.zeros(M if "mismatched" in name else 0) for name in names}
        inputs |= {name: x.bool() for name, x in inputs.items() if name == "desirable"}
    inputs |= {name: inputs[name].requires_grad_() for name in learned}
    loss = call(name, **inputs)
    assert torch.equal(loss, torch.zeros(B if name in JUDGES else 0))
    loss.sum().backward()
    assert all(inputs[name].grad.shape == inputs[name].shape for name in learned)


@pytest.mark.parametrize("padding", [0.0, 1e9, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", JUDGES)
def test_a_list_without_candidates_costs_nothing(name, padding):
    *tensors, mask = padded(padding)
    whole = [torch.cat([x, torch.full((1, 6), padding).to(x)]) for x in tensors]
    mask_of_all = torch.cat([mask, torch.zeros(1, 6, dtype=torch.bool)])
    loss = list_loss(name, *whole, mask_of_all)
    slope = gradient(lambda *args: list_loss(name, *args), *whole, mask_of_all)
    assert torch.equal(loss[:-1], list_loss(name, *tensors, mask)) and loss[-1] == 0
    assert slope.isfinite().all() and not slope[-1].any()


def test_minimum_risk_training_is_lire():
    """Shen et al. 2016: the risk 1 - reward, sharpness alpha = 1 / T."""
    s, T = torch.tensor([[-3.0, -5.0, -1.0]], dtype=torch.float64), 2.0
    r = torch.tensor([[0.2, 1.0, 0.5]]).double()
    risk = oracle.mrt_risk(s[0].exp().numpy(), 1 - r[0].numpy(), 1 / T)
    assert lire.lire_loss(s, r, s == s, T).item() + 1 == pytest.approx(risk)


# --------------------------------------------------------------- against TRL, where it is installed


def trl_loss(trainer_name, logps, ref_logps, beta, **inputs):
    """The loss of TRL's own code, given log-probs [N] as those of one-token responses.

    Written for TRL 1.16.
    """
    trl = pytest.importorskip("trl", minversion="1.16")
    # A token of prompt, a token of response.
    sequences = torch.ones(len(logps), 2, dtype=torch.long)
    outputs = types.SimpleNamespace(log_probs=logps[:, None], is_top1=logps[:, None] > 0)
    outputs.entropy = outputs.mean_logits = torch.zeros(len(logps), 1)
    accelerator = types.SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    dpo = dict(f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0])
    dpo |= dict(ld_alpha=None, use_weighting=False, precompute_ref_logps=True)
    kto = dict(loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    trainer = types.SimpleNamespace(
        model=torch.nn.Identity().eval(),
        accelerator=accelerator,
        beta=beta,
        aux_loss_enabled=False,
        **dpo,
        **kto,
        _compute_kl_logps=lambda *_: inputs["KL_logps"],
        _total_train_tokens=0,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    batch = {
        "input_ids": sequences,
        "attention_mask": sequences,
        "completion_mask": torch.tensor([[0, 1]] * len(logps)),
        "ref_logps": ref_logps,
    }
    compute_loss = getattr(trl, trainer_name)._compute_loss
    return compute_loss(trainer, lambda **_: outputs, batch | inputs, False)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_equals_trl(beta):
    chosen, rejected, ref_chosen, ref_rejected = pairs(*RATIOS)
    refs = dict(ref_chosen_logps=ref_chosen, ref_rejected_logps=ref_rejected)
    both = torch.cat([chosen, rejected])
    expected = trl_loss("DPOTrainer", both, None, beta, **refs).item()
    loss = baselines.dpo_loss(*pairs(*RATIOS), beta)
    assert loss.mean().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 5.0])
@pytest.mark.parametrize("mismatched", [MISMATCHED, (-2.0, -1.0, 0.0, 0.0)])
def test_kto_equals_trl(beta, mismatched):
    ratios, other = (torch.tensor(x, dtype=torch.float64) for x in (L, mismatched))
    own = dict(label=torch.tensor(GOOD), KL_logps=other, ref_KL_logps=torch.zeros_like(other))
    refs = torch.full_like(ratios, -3)
    expected = trl_loss("KTOTrainer", ratios - 3, refs, beta, **own).item()
    loss = kto(beta=beta, mismatched=mismatched).mean().item()
    assert loss == pytest.approx(expected, abs=1e-12)
