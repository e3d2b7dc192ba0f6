"""What is minimised: every objective against the oracle, its row, its metrics by hand."""

import types

import numpy as np
import oracle
import pytest
import torch

import baselines
import dro
import lire
import objectives
from harness.config import Config, resolve
from objectives import NEEDS, OBJECTIVES, Inputs, total

TRAINED = [name for name, row in OBJECTIVES.items() if row.loss]


def inputs_of(rewards, mask=None):
    """x of lists with made-up log-probs, their reference and lengths of 1 to 5 tokens."""
    g, rewards = torch.Generator().manual_seed(7), torch.tensor(rewards)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else torch.tensor(mask)
    lengths = torch.where(mask, torch.randint(1, 6, rewards.shape, generator=g), 0)
    logps, ref_logps = -3 * torch.rand(2, *rewards.shape, generator=g)
    return Inputs(logps.requires_grad_(), ref_logps, rewards, mask, lengths)


def config(name, **settings):
    return resolve(Config(objective=name, out="x", device="cpu", **settings))


def loss_of(name, x, **settings):
    return total(OBJECTIVES[name].loss(config(name, **settings), x))


def row(x, place):
    """Log-probs, reference's, lengths, rewards of the real candidates of a list, as lists."""
    tensors = x.logps.detach(), x.ref_logps, x.lengths, x.rewards
    return [tensor[place][x.mask[place]].tolist() for tensor in tensors]


RAGGED = (
    [[0.5, 2.0, 1.0], [3.0, 1.0, 9.0], [1.0, 1.0, 1.0]],
    [[True] * 3, [True, True, False], [True] * 3],
)

# ------------------------------------------------------------------------------------- LIRE and DRO


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("norm", ["softmax", "zscore", "none"])
def test_lire_is_the_expected_reward_and_its_share_of_the_best_response(score, norm):
    x = inputs_of(*RAGGED)
    scores = x.logps / x.lengths.clamp_min(1) if score == "mean" else x.logps
    rewards = lire.transform_rewards(x.rewards, x.mask, norm)
    expected = lire.lire_loss(scores, rewards, x.mask, 2.0)
    expected = expected + 0.3 * lire.sft_loss(x.logps, x.lengths, x.rewards, x.mask)
    own = {"score": score, "reward_norm": norm, "temperature": 2.0}
    loss = loss_of("lire", x, **own, sft_weight=0.3)
    assert loss.item() == pytest.approx(expected.mean().item())
    without = loss_of("lire", x, **own, sft_weight=0.0)
    nll = [oracle.sft_loss(s, n, r) for s, _, n, r in (row(x, b) for b in range(3))]
    assert (loss - without).item() == pytest.approx(0.3 * np.mean(nll), rel=1e-5)


def test_global_rewards_were_put_on_their_scale_with_the_pool_and_are_left_alone():
    x = inputs_of(*RAGGED)
    losses = [loss_of("lire", x, reward_norm=norm).item() for norm in ("global", "none")]
    assert losses[0] == losses[1] != loss_of("lire", x, reward_norm="softmax").item()


def test_dro_counts_every_response_once_with_its_prompts_value():
    x = inputs_of([[0.5, 2.0, 1.0], [3.0, 1.0, 9.0]], [[True] * 3, [True, False, False]])
    logps = torch.where(x.mask, x.logps, torch.nan)  # an empty slot may hold anything
    x = x._replace(logps=logps, values=torch.tensor([0.3, -0.7]))
    losses = OBJECTIVES["dro"].loss(config("dro", tau=0.5), x)
    expected = [
        dro.dro_v_losses(
            logps[i, j, None],
            x.ref_logps[i, j, None],
            x.rewards[i, j, None],
            torch.tensor([v]),
            0.5,
        )
        for i, j, v in ((0, 0, 0.3), (0, 1, 0.3), (0, 2, 0.3), (1, 0, -0.7))
    ]
    for k, name in enumerate(("loss/policy", "loss/value")):
        torch.testing.assert_close(losses[name], torch.cat([parts[k] for parts in expected]))
    parts = sum(loss.mean().item() for loss in losses.values())
    assert total(losses).item() == pytest.approx(parts)


def test_dro_p_takes_the_real_responses_of_the_batch_and_no_others():
    x = inputs_of(*RAGGED)
    flat = x.logps[x.mask], x.ref_logps[x.mask], x.rewards[x.mask]
    expected = dro.dro_p_loss(*flat, 0.5).mean()
    assert loss_of("dro-p", x, tau=0.5).item() == pytest.approx(expected.item())


def test_the_total_adds_up_the_means_of_parts_of_unlike_sizes():
    losses = {"loss/policy": torch.tensor([1.0, 2.0, 6.0]), "loss/value": torch.tensor([4.0])}
    assert total(losses).item() == 3.0 + 4.0


# ---------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", ["dpo", "ipo", "slic"])
def test_the_pair_of_a_list_is_its_best_against_its_worst(name):
    x = inputs_of(*RAGGED)
    expected = []
    for b, i, j in ((0, 1, 0), (1, 0, 1)):  # list, chosen, rejected; the third list is a tie
        s, ref, *_ = row(x, b)
        if name == "slic":
            expected.append(oracle.slic_loss(s[i], s[j], 1.0))
        else:
            expected.append(getattr(oracle, f"{name}_loss")(s[i] - ref[i], s[j] - ref[j], 0.3))
    own = {"sft_weight": 0.0} if name == "slic" else {"beta": 0.3}
    assert loss_of(name, x, **own).item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "pl-dpo", "slic", "kto"])
def test_a_batch_of_ties_teaches_nothing(name):
    x = inputs_of([[1.1, 1.1], [1.1, 1.1]])
    own = {"sft_weight": 0.0} if name == "slic" else {}
    if name == "kto":
        x = x._replace(mismatched=(torch.zeros(2), torch.zeros(2)))
    loss_of(name, x, **own).backward()
    assert not x.logps.grad.any()


def test_slic_learns_its_sft_term_from_ties_too():
    x = inputs_of([[1.1, 1.1], [1.1, 1.1]])
    nll = [oracle.sft_loss(s, n, r) for s, _, n, r in (row(x, b) for b in range(2))]
    loss = loss_of("slic", x, sft_weight=0.2)
    assert loss.item() == pytest.approx(0.2 * np.mean(nll), rel=1e-5)


def test_list_objectives_add_their_share_of_the_best_response():
    x = inputs_of(*RAGGED)
    rows = [row(x, b) for b in range(3)]
    best = [oracle.sft_loss(s, n, r) for s, _, n, r in rows]
    rrhf = [oracle.rrhf_loss(s, n, r) + 1.0 * nll for (s, _, n, r), nll in zip(rows, best)]
    pro = [
        oracle.pro_loss(s, n, r) + 0.05 * (len(s) - 1) ** 2 * nll
        for (s, _, n, r), nll in zip(rows, best)
    ]
    ranked = [
        oracle.plackett_luce_loss(np.array(s) - np.array(ref), r, 0.1) for s, ref, _, r in rows
    ]
    ranked[2] = 0.0  # equal rewards have no order
    for name, own, expected in (
        ("rrhf", {"sft_weight": 1.0}, rrhf),
        ("pro", {"sft_weight": 0.05}, pro),
        ("pl-dpo", {"beta": 0.1}, ranked),
        ("rwr", {"tau": 0.7}, [oracle.rwr_loss(s, r, 0.7) for s, _, _, r in rows]),
    ):
        assert loss_of(name, x, **own).item() == pytest.approx(np.mean(expected), rel=1e-5), name
    slic = [loss_of("slic", x, sft_weight=weight).item() for weight in (0.1, 0.0)]
    assert slic[0] - slic[1] == pytest.approx(0.1 * np.mean(best), rel=1e-5)


@pytest.mark.parametrize(
    "desirable, good",
    [("mean", [False, True, True, False]), ("positive", [True, True, True, False])],
)
def test_kto_takes_what_is_above_the_mean_or_above_0_for_desirable(desirable, good):
    x = inputs_of([[0.5, 2.0, 1.0], [-1.0, 9.0, 9.0]], [[True] * 3, [True, False, False]])
    mismatched = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    loss = loss_of("kto", x._replace(mismatched=mismatched), desirable=desirable, beta=0.4)
    ratios = (x.logps - x.ref_logps)[x.mask].tolist()
    other = (mismatched[0] - mismatched[1]).tolist()
    expected = oracle.kto_loss(ratios, good, other, 0.4)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.25, 3.0])
def test_the_loss_of_desirable_responses_is_multiplied_by_its_weight(weight):
    x = inputs_of([[0.5, -2.0, 1.0], [-1.0, 9.0, 9.0]], [[True] * 3, [True, False, False]])
    mismatched = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    own = {"desirable": "positive", "beta": 0.4, "desirable_weight": weight}
    loss = loss_of("kto", x._replace(mismatched=mismatched), **own)
    # By hand: 1 - sigmoid of beta l - z, or of z - beta l where it is undesirable.
    sigmoid = lambda margin: 1 / (1 + np.exp(-margin))
    z = 0.4 * max(0.0, (0.5 - 1.0) / 2)
    margins = 0.4 * (x.logps - x.ref_logps)[x.mask].detach().double().numpy() - z
    parts = [
        weight * (1 - sigmoid(margins[0])),
        1 - sigmoid(-margins[1]),
        weight * (1 - sigmoid(margins[2])),
        1 - sigmoid(-margins[3]),
    ]
    assert loss.item() == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_a_weight_of_one_changes_no_bit():
    x = inputs_of([[0.5, -2.0, 1.0], [-1.0, 9.0, 9.0]])
    x = x._replace(mismatched=(torch.tensor([-1.0]), torch.tensor([-1.5])))
    c = config("kto", desirable="positive")
    (loss,) = OBJECTIVES["kto"].loss(c, x).values()
    args = (x.logps[x.mask], x.ref_logps[x.mask], x.rewards[x.mask] > 0, *x.mismatched)
    assert torch.equal(loss, baselines.kto_loss(*args, c.beta))


def advice(rewards, **settings):
    return OBJECTIVES["kto"].advice(config("kto", **settings), rewards)


def test_a_weight_is_suggested_where_one_kind_is_rare():
    many = advice([1.0] * 160 + [-1.0] * 8, desirable="positive")
    assert "160 responses are desirable and 8 are not" in many
    assert "--desirable-weight between 0.05 and 0.067" in many and "(here it is 1)" in many
    few = advice([1.0] * 8 + [-1.0] * 160, desirable="positive")
    assert "--desirable-weight between 20 and 27" in few
    for weight in (0.05, 0.06, 0.067):  # 1 to 4/3 times 8 / 160
        own = {"desirable": "positive", "desirable_weight": weight}
        assert not advice([1.0] * 160 + [-1.0] * 8, **own)
    for weight in (0.049, 0.07):
        own = {"desirable": "positive", "desirable_weight": weight}
        assert advice([1.0] * 160 + [-1.0] * 8, **own)
    assert not advice([1.0] * 20 + [-1.0] * 80, desirable="positive")  # a fifth is not rare
    assert advice([1.0] * 19 + [-1.0] * 81, desirable="positive")
    assert not advice([1.0] * 20, desirable="positive")
    # Above the mean of 4.75, where thumbs are not asked for.
    assert "95 responses are desirable and 5 are not" in advice([5.0] * 95 + [0.0] * 5)


def test_best_and_worst_skip_ties_and_empty_slots():
    x = inputs_of(
        [[9.0, 2.0, 1.0], [0.0, 1.0, 9.0], [1.0, 1.0, 5.0]],
        [[True] * 3] + 2 * [[True, True, False]],
    )
    best, worst = objectives.best_and_worst(x)
    assert [t.tolist() for t in (*best, *worst)] == [[0, 1], [0, 1], [0, 1], [2, 0]]
    assert objectives.unlike(x).tolist() == [True, True, False]


# ----------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("padding", [1e9, -1e9, torch.inf, torch.nan])
@pytest.mark.parametrize("name", TRAINED)
def test_what_an_empty_slot_holds_changes_no_loss_and_no_gradient(name, padding):
    results = []
    for filler in (0.0, padding):
        x = inputs_of(*RAGGED)
        x = x._replace(values=torch.tensor([0.3, -0.7, 0.1]), mismatched=(-x.mask[0].float(),) * 2)
        ref_logps, rewards = (
            torch.where(x.mask, tensor, filler) for tensor in (x.ref_logps, x.rewards)
        )
        logps = torch.where(x.mask, x.logps.detach(), filler).requires_grad_()
        x = x._replace(logps=logps, ref_logps=ref_logps, rewards=rewards)
        loss = loss_of(name, x)
        loss.backward()
        results.append((loss.item(), logps.grad.tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_fits_the_options_and_the_needs_there_are(name):
    objective = OBJECTIVES[name]
    assert objective.needs <= set(NEEDS) and set(objective.defaults) <= set(vars(Config()))
    assert "lr" in objective.defaults
    assert objective.strength is None or objective.strength in objective.defaults
    objectives.try_objective(config(name))


def reads_of(name):
    """The options that an objective's loss and metrics read, of a Config that has all of them."""
    reads, c = set(), config(name)

    class Watched:
        def __getattr__(self, option):
            reads.add(option)
            return getattr(c, option)

    x = inputs_of(*RAGGED)
    x = x._replace(values=torch.tensor([0.3, -0.7, 0.1]), mismatched=(x.rewards[0],) * 2)
    OBJECTIVES[name].loss(Watched(), x)
    OBJECTIVES[name].metrics(Watched(), x)
    return reads


@pytest.mark.parametrize("name", TRAINED)
def test_an_objective_reads_the_options_of_its_row_and_no_others(name):
    elsewhere = {"lr", "value", "value_lr", "share_networks"}  # of the optimiser and the networks
    everyones = {"objective", "reward_norm"}
    assert reads_of(name) - everyones == set(OBJECTIVES[name].defaults) - elsewhere


@pytest.mark.parametrize("need", ["reference", "values", "mismatched"])
def test_an_objective_that_reads_what_its_row_does_not_name_fails_in_the_first_second(
    need, monkeypatch
):
    names = [name for name in TRAINED if need in OBJECTIVES[name].needs]
    assert names
    for name in names:
        objective = OBJECTIVES[name]
        monkeypatch.setitem(OBJECTIVES, name, objective._replace(needs=objective.needs - {need}))
        with pytest.raises(
            ValueError, match="(objectives|dro|baselines).py:.*(Type|Attribute)Error"
        ):
            objectives.try_objective(config(name))


def nothing_to_learn_from(c, x):
    return {"loss": x.rewards[x.mask].mean()}


def without_its_mask(c, x):
    return {"loss": -(x.logps * x.rewards).sum(-1)}


def with_a_wrong_name(c, x):
    return {"loss": x.logs}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": nothing_to_learn_from}, "does not require grad"),
        ({"loss": without_its_mask}, "is a mask missing"),
        ({"loss": with_a_wrong_name}, r"test_objectives.py:\d+: AttributeError: .*logs"),
        ({"metrics": with_a_wrong_name}, r"test_objectives.py:\d+: AttributeError: .*logs"),
        ({"defaults": {"margin": 1.0}}, "its row names margin, which is no field of Config"),
        ({"residual": objectives.dro_residual}, "no strength that says whose optimum"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_a_slip_in_a_row_shows_in_the_first_second(change, message, monkeypatch):
    c = config("lire")
    monkeypatch.setitem(OBJECTIVES, "lire", OBJECTIVES["lire"]._replace(**change))
    with pytest.raises(ValueError, match=message):
        objectives.try_objective(c)


# ------------------------------------------------------------------------------------------ metrics


def test_chosen_and_rejected_are_best_and_worst_in_the_objectives_own_strength():
    x = inputs_of(*RAGGED)
    ratios = (x.logps - x.ref_logps).detach()
    chosen, rejected = [(0, 1), (1, 0)], [(0, 0), (1, 1)]
    for name, own, strength in (("dpo", {"beta": 0.3}, 0.3), ("rrhf", {}, 1.0)):
        metrics = objectives.common_metrics(config(name, **own), x)
        for kind, places in (("chosen", chosen), ("rejected", rejected)):
            expected = [strength * ratios[place].item() for place in places]
            assert metrics[f"rewards/{kind}"].tolist() == pytest.approx(expected)
            logps = [x.logps[place].item() for place in places]
            assert metrics[f"logps/{kind}"].tolist() == pytest.approx(logps)
        margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        assert torch.equal(metrics["rewards/margins"], margins)
        assert torch.equal(metrics["rewards/accuracies"], (margins > 0).float())
    assert objectives.common_metrics(config("dro"), inputs_of([[1.0], [2.0]])) == {}


def test_the_softmax_of_lire_by_hand():
    x = inputs_of([[1.0, 0.0], [2.0, 7.0]], [[True, True], [True, False]])
    x = x._replace(logps=torch.tensor([[0.0, -2 * np.log(3.0)], [-4.0, 0.0]]))
    metrics = objectives.lire_metrics(config("lire", temperature=2.0), x)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert metrics["rewards/expected"].tolist() == pytest.approx([0.75, 2.0])
    assert metrics["candidates/max_prob"].tolist() == pytest.approx([0.75, 1.0])
    assert metrics["candidates/entropy"].tolist() == pytest.approx([entropy, 0.0], abs=1e-6)
    assert metrics["candidates/collapsed"].tolist() == [0.0, 0.0]  # a single response can't
    x = x._replace(logps=torch.tensor([[0.0, -2 * np.log(1000.0)], [-4.0, 0.0]]))
    metrics = objectives.lire_metrics(config("lire", temperature=2.0), x)
    assert metrics["candidates/collapsed"].tolist() == [1.0, 0.0]


def test_a_collapse_is_said_aloud_with_the_way_out_and_only_then():
    warning = OBJECTIVES["lire"].warning
    assert "in 95% of the lists; try a higher --temperature" in warning(
        {"candidates/collapsed": 0.95}
    )
    for share in (0.9, 0.0, None):
        assert warning({"candidates/collapsed": share}) is None
    assert warning({}) is None and OBJECTIVES["dro"].warning({"candidates/collapsed": 1.0}) is None


def test_the_residual_of_dro_and_what_v_explains_of_it():
    x = inputs_of(*RAGGED)._replace(values=torch.tensor([0.3, -0.7, 0.1]))
    metrics = objectives.dro_metrics(config("dro", tau=0.5), x)
    ratios = (x.logps - x.ref_logps).detach()
    targets = (x.rewards - 0.5 * ratios)[x.mask].numpy()
    values = np.array([0.3] * 3 + [-0.7] * 2 + [0.1] * 3)
    rms = np.sqrt(np.mean((targets - values) ** 2))
    assert metrics["residual/rms"].item() == pytest.approx(rms, rel=1e-5)
    explained = 1 - np.var(targets - values) / np.var(targets)
    assert metrics["value/explained_variance"].item() == pytest.approx(explained, rel=1e-4)
    assert metrics["rewards/implied"].tolist() == pytest.approx(0.5 * ratios[x.mask], rel=1e-5)
    pearson = np.corrcoef(ratios[x.mask].numpy(), x.rewards[x.mask].numpy())[0, 1]
    assert metrics["rewards/correlation"].item() == pytest.approx(pearson, rel=1e-5)
    constant = torch.ones(3), torch.rand(3)
    assert objectives.correlation(*constant).isnan()


def test_the_residual_is_constant_within_a_prompt_at_the_optimum():
    ref_logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    rewards = torch.tensor([[1.0, 0.0, -1.0]])
    ratios = dro.optimal_logps(ref_logps, rewards, 0.4) - ref_logps
    value = dro.optimal_value(ref_logps, rewards, 0.4).item()
    for name in ("dro", "dro-p"):
        c = types.SimpleNamespace(tau=0.4)
        residual = OBJECTIVES[name].residual(c, rewards, ratios)
        assert residual.tolist()[0] == pytest.approx([value] * 3, abs=1e-6)
