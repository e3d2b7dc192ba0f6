"""What is minimised: one short function and one row of OBJECTIVES for each --objective.

The function takes the run's Config, of which it reads its own options, and Inputs of a batch; it
gives named losses, unreduced, whose means are added up. The formulas are in lire.py, dro.py and
baselines.py. The row says what the objective reads and needs; nobody else asks which one runs.
"""

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import baselines
import dro
import lire


class Inputs(NamedTuple):
    """What an objective sees of a batch: B lists of M candidates."""

    logps: Tensor  # [B, M] log pi(y|x), a sum over tokens, with gradient
    ref_logps: Tensor | None  # [B, M] the same under the reference
    rewards: Tensor  # [B, M]
    mask: Tensor  # [B, M] bool, True where a candidate is real
    lengths: Tensor  # [B, M] tokens, EOS included
    values: Tensor | None = None  # [B] V(x), with gradient
    mismatched: tuple[Tensor, Tensor] | None = None  # [K] each: log-probs of policy and reference


Losses = dict[str, Tensor]

# ------------------------------------------------------------------------------------- LIRE and DRO


def lire_scores(c: Any, x: Inputs) -> Tensor:
    """What LIRE's distribution compares [B, M]: log-probs, or their means per token."""
    return x.logps / x.lengths.clamp_min(1) if c.score == "mean" else x.logps


def lire_objective(c: Any, x: Inputs) -> Losses:
    """The list's expected reward, negated (Eq. 5), and the SFT term of its best response."""
    how = "none" if c.reward_norm == "global" else c.reward_norm  # the pool is scaled already
    rewards = lire.transform_rewards(x.rewards, x.mask, how)
    loss = lire.lire_loss(lire_scores(c, x), rewards, x.mask, c.temperature)
    return {"loss/lire": loss} | sft_term(c, x)


def dro_objective(c: Any, x: Inputs) -> Losses:
    """DRO-V (Algorithm 1): every response counts once, and has its prompt's value."""
    values = x.values[:, None].expand_as(x.mask)[x.mask]  # [N]
    logps, ref_logps, rewards = x.logps[x.mask], x.ref_logps[x.mask], x.rewards[x.mask]
    policy, value = dro.dro_v_losses(logps, ref_logps, rewards, values, c.tau)
    return {"loss/policy": policy, "loss/value": value}


def dro_p_objective(c: Any, x: Inputs) -> Losses:
    """DRO-P (Appendix B): the batch's mean in the value's place."""
    logps, ref_logps, rewards = x.logps[x.mask], x.ref_logps[x.mask], x.rewards[x.mask]
    return {"loss": dro.dro_p_loss(logps, ref_logps, rewards, c.tau)}


# ---------------------------------------------------------------------------------------- baselines


def dpo_objective(c: Any, x: Inputs) -> Losses:
    """DPO on the best and the worst response of each list."""
    chosen, rejected = best_and_worst(x)
    logps = x.logps[chosen], x.logps[rejected], x.ref_logps[chosen], x.ref_logps[rejected]
    return {"loss": mean_over_pairs(baselines.dpo_loss(*logps, c.beta))}


def ipo_objective(c: Any, x: Inputs) -> Losses:
    """IPO on the best and the worst response of each list."""
    chosen, rejected = best_and_worst(x)
    logps = x.logps[chosen], x.logps[rejected], x.ref_logps[chosen], x.ref_logps[rejected]
    return {"loss": mean_over_pairs(baselines.ipo_loss(*logps, c.beta))}


def slic_objective(c: Any, x: Inputs) -> Losses:
    """SLiC's hinge on the best and the worst response, and the likelihood of the best."""
    chosen, rejected = best_and_worst(x)
    loss = mean_over_pairs(baselines.slic_loss(x.logps[chosen], x.logps[rejected]))
    return {"loss/slic": loss} | sft_term(c, x)


def pl_dpo_objective(c: Any, x: Inputs) -> Losses:
    """DPO for a ranking; equal rewards have no order, so a list of them alone teaches nothing."""
    loss = baselines.plackett_luce_loss(x.logps, x.ref_logps, x.rewards, x.mask, c.beta)
    return {"loss": unlike(x) * loss}


def rrhf_objective(c: Any, x: Inputs) -> Losses:
    """RRHF's ranking of mean log-probs, and the likelihood of the best response."""
    loss = baselines.rrhf_loss(x.logps, x.lengths, x.rewards, x.mask)
    return {"loss/rrhf": loss} | sft_term(c, x)


def pro_objective(c: Any, x: Inputs) -> Losses:
    """PRO's ranking, and the likelihood of the best response times (M - 1)^2, as in its paper."""
    loss = baselines.pro_loss(x.logps, x.lengths, x.rewards, x.mask)
    return {"loss/pro": loss} | sft_term(c, x, (x.mask.sum(-1) - 1) ** 2)


def rwr_objective(c: Any, x: Inputs) -> Losses:
    """Reward-weighted likelihood: a yardstick, whose target is near pi* where M is large."""
    return {"loss": baselines.rwr_loss(x.logps, x.rewards, x.mask, c.tau)}


def kto_objective(c: Any, x: Inputs) -> Losses:
    """KTO: desirable is what earns more than the batch's mean, or of thumbs what is up.

    The loss of desirable responses is multiplied by --desirable-weight.
    """
    rewards = x.rewards[x.mask].double()
    if c.desirable == "positive":
        desirable, teaches = rewards > 0, True
    else:  # where all earn the same, nobody is above the mean or below it
        desirable, teaches = rewards > rewards.mean(), rewards.max() > rewards.min()
    logps, ref_logps = x.logps[x.mask], x.ref_logps[x.mask]
    loss = baselines.kto_loss(logps, ref_logps, desirable, *x.mismatched, c.beta) * teaches
    return {"loss": torch.where(desirable, c.desirable_weight, 1.0) * loss}


# ---------------------------------------------------------------------------------- what they share


def sft_term(c: Any, x: Inputs, scale: Tensor | float = 1.0) -> Losses:
    """--sft-weight (times scale) x the best response's mean negative log-likelihood per token."""
    if not c.sft_weight:
        return {}
    loss = lire.sft_loss(x.logps, x.lengths, x.rewards, x.mask)  # [B]
    return {"loss/sft": scale * (c.sft_weight * loss)}


def unlike(x: Inputs) -> Tensor:
    """[B] bool: does a list hold two different rewards?"""
    best = x.rewards.masked_fill(~x.mask, -torch.inf).amax(-1)
    return best > x.rewards.masked_fill(~x.mask, torch.inf).amin(-1)


def best_and_worst(x: Inputs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Indices into [B, M] of each list's best and worst candidate; lists of ties are left out."""
    rows = unlike(x).nonzero()[:, 0]
    best = x.rewards.masked_fill(~x.mask, -torch.inf).argmax(-1)
    worst = x.rewards.masked_fill(~x.mask, torch.inf).argmin(-1)
    return (rows, best[rows]), (rows, worst[rows])


def mean_over_pairs(losses: Tensor) -> Tensor:
    """The mean of [N] losses; 0, with a gradient of 0, where a batch of ties has no pair."""
    return losses.sum() / max(len(losses), 1)


def total(losses: Losses) -> Tensor:
    """The number to minimise: the means of the parts, added up."""
    return sum(part.mean() for part in losses.values())


# ---------------------------------------------------------------------------------------- the table


def unlike_rewards(c: Any, rewards: list[float]) -> dict:
    """Refuse rewards that are all the same.

    Returns: no settings.
    Raises: ValueError.
    """
    if max(rewards) == min(rewards):
        raise ValueError(f"every reward is {rewards[0]}: there is nothing to learn")
    return {}


def thumbs(c: Any, rewards: list[float]) -> dict:
    """KTO: a file's rewards that are all 1 or -1 are thumbs, and say what is desirable.

    Returns: --desirable, where it was not given.
    Raises: ValueError where one kind is missing.
    """
    desirable = c.desirable
    if desirable is None:
        desirable = "positive" if c.data and set(rewards) <= {1.0, -1.0} else "mean"
    if desirable == "mean":
        unlike_rewards(c, rewards)
    elif (up := sum(reward > 0 for reward in rewards)) in (0, len(rewards)):
        raise ValueError(
            f"--objective {c.objective} needs desirable and undesirable responses, and none of "
            f"these {len(rewards)} is {'undesirable' if up else 'desirable'}"
        )
    return {"desirable": desirable}


def kto_advice(c: Any, rewards: list[float]) -> str:
    """The weight that KTO's paper suggests where one kind is under a fifth of the responses.

    weight x desirable / undesirable is to be between 1 and 4/3 (arXiv 2402.01306).
    """
    middle = 0.0 if c.desirable == "positive" else sum(rewards) / len(rewards)
    up = sum(reward > middle for reward in rewards)
    down = len(rewards) - up
    if not up or not down or 5 * min(up, down) >= len(rewards):
        return ""
    if 1 - 1e-6 <= c.desirable_weight * up / down <= 4 / 3 + 0.02:
        return ""
    return (
        f"{up} responses are desirable and {down} are not: KTO's paper suggests a "
        f"--desirable-weight between {down / up:.2g} and {4 / 3 * down / up:.2g}, that the two "
        f"kinds weigh alike (here it is {c.desirable_weight:g})"
    )


def kto_conflict(c: Any) -> str:
    """Above 0 is a statement about the rewards as they are."""
    if c.desirable == "positive" and c.reward_norm == "global":
        return (
            "--desirable positive is about the rewards as they are: leave --reward-norm global away"
        )
    return ""


def dro_conflict(c: Any) -> str:
    """A shared network has no learning rate of its own."""
    if c.share_networks and c.value_lr is not None:
        return "--value-lr is of a value network of its own: leave it or --share-networks away"
    return ""


def log_ratios(c: Any, x: Inputs) -> Tensor:
    """[B, M] log pi / pi_ref times the objective's strength: the reward that the policy implies."""
    strength = OBJECTIVES[c.objective].strength
    return (getattr(c, strength) if strength else 1.0) * (x.logps - x.ref_logps)


def common_metrics(c: Any, x: Inputs) -> dict[str, Tensor]:
    """What every objective logs of a step, in TRL's names: chosen is a list's best candidate."""
    if x.mask.sum(-1).max() < 2:
        return {}  # a single response is no comparison
    best, worst = best_and_worst(x)
    implied = log_ratios(c, x)
    chosen, rejected = implied[best], implied[worst]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": x.logps[best],
        "logps/rejected": x.logps[worst],
    }


def lire_metrics(c: Any, x: Inputs) -> dict[str, Tensor]:
    """The listwise distribution: what it expects to earn, and how far it has saturated."""
    P = lire.candidate_probs(lire_scores(c, x), x.mask, c.temperature)
    largest = P.max(-1).values
    return {
        "rewards/expected": (P * x.rewards).sum(-1),
        "candidates/entropy": -torch.where(P > 0, P * P.clamp_min(1e-30).log(), 0.0).sum(-1),
        "candidates/max_prob": largest,
        "candidates/collapsed": ((largest > 0.99) & (x.mask.sum(-1) > 1)).float(),
    }


def lire_warning(metrics: dict) -> str | None:
    """What to say aloud where nearly every list has saturated: such lists teach nothing."""
    share = metrics.get("candidates/collapsed") or 0.0
    if share <= 0.9:
        return None
    return (
        "the listwise distribution has collapsed: one candidate holds over 99 % in "
        f"{share:.0%} of the lists; try a higher --temperature or --score mean"
    )


def implied_metrics(c: Any, x: Inputs) -> dict[str, Tensor]:
    """The implied reward of all responses, and its correlation with their rewards."""
    implied, rewards = log_ratios(c, x)[x.mask], x.rewards[x.mask]
    return {"rewards/implied": implied, "rewards/correlation": correlation(implied, rewards)}


def dro_metrics(c: Any, x: Inputs) -> dict[str, Tensor]:
    """The residual r - V - tau log-ratio that DRO makes small, and how much of it V explains."""
    targets = dro_residual(c, x.rewards, x.logps - x.ref_logps)[x.mask]
    values = x.values[:, None].expand_as(x.mask)[x.mask]
    unexplained = (targets - values).var(correction=0) / targets.var(correction=0)
    return {
        **implied_metrics(c, x),
        "value/mean": values,
        "value/explained_variance": 1 - unexplained,
        "residual/rms": (targets - values).square().mean().sqrt(),
    }


def dro_residual(c: Any, rewards: Tensor, ratios: Tensor) -> Tensor:
    """r - tau log pi/pi_ref, which at the optimum is V*(x) for every response of a prompt."""
    return rewards - c.tau * ratios


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's, of two [N] tensors; nan where one is constant."""
    first, second = (values.double() - values.double().mean() for values in (first, second))
    return (first @ second) / (first.norm() * second.norm())


class Objective(NamedTuple):
    """A row: all that the rest of the program has to know of an objective."""

    # (c, x) -> named losses; None: the reference is all there is to train.
    loss: Callable[[Any, Inputs], Losses] | None
    # Of the options that it reads. Those of other objectives are refused.
    defaults: dict[str, Any]
    # What a batch must hold for it, names of NEEDS.
    needs: set[str] = set()
    # The values of --reward-norm that it takes, its default first.
    reward_norm: tuple[str, ...] = ("none", "global")
    # The option that scales its log-ratio in the log.
    strength: str | None = None
    # Rounds, on a task; 1 is offline, on samples of the reference.
    evolve: int = 1
    # Other options of every run that it has a default of its own for, on a task.
    on_tasks: dict[str, Any] = {}
    # Why its options don't go together; empty where they do.
    conflict: Callable[[Any], str] = lambda c: ""
    # What the rewards of a file decide; ValueError where rewards teach nothing.
    prepare: Callable[[Any, list[float]], dict] = unlike_rewards
    # What is to be said once of the rewards of a file.
    advice: Callable[[Any, list[float]], str] = lambda c, rewards: ""
    # Metrics of its own, of a step.
    metrics: Callable[[Any, Inputs], dict[str, Tensor]] = implied_metrics
    # What is to be said aloud of a row of the log; None where it is nothing.
    warning: Callable[[dict], str | None] = lambda row: None
    # (c, rewards, log-ratios): constant within a prompt at pi* of its strength.
    residual: Callable[[Any, Tensor, Tensor], Tensor] | None = None

    def run_defaults(self) -> dict[str, Any]:
        """Defaults of a run with this objective."""
        own = {"reward_norm": self.reward_norm[0], "evolve": self.evolve}
        return {"lr": 5e-4, **own, **self.defaults}


NEEDS = {
    "lists": "compares the candidates of a list",
    "pairs": "compares the best and the worst candidate of a list",
    "batch": "compares the responses of a batch",
    "reference": "reads the reference's log-probs",
    "values": "trains a value network",
    "mismatched": "scores prompts with the responses of others",
}

# Rates and strengths were chosen by experiments.grid, which looks at training prompts alone.
OBJECTIVES = {
    "lire": Objective(
        lire_objective,
        {"lr": 2e-3, "temperature": 16.0, "score": "sum", "sft_weight": 0.1},
        {"lists"},
        evolve=10,
        reward_norm=("softmax", "zscore", "global", "none"),
        metrics=lire_metrics,
        warning=lire_warning,
    ),
    "dro": Objective(
        dro_objective,
        {"lr": 5e-4, "tau": 0.5, "value": "prompt", "value_lr": None, "share_networks": False},
        {"reference", "values"},
        reward_norm=("global", "none"),
        strength="tau",
        # Many updates on many prompts: what helped it most (results/README.md).
        on_tasks={"candidates": 2, "batch_size": 64, "steps": 1600, "iterate": 2},
        conflict=dro_conflict,
        metrics=dro_metrics,
        residual=dro_residual,
    ),
    "dro-p": Objective(
        dro_p_objective,
        {"lr": 5e-4, "tau": 0.2},
        {"reference", "batch"},
        reward_norm=("global", "none"),
        strength="tau",
        residual=dro_residual,
    ),
    "dpo": Objective(
        dpo_objective, {"lr": 2.5e-4, "beta": 0.5}, {"pairs", "reference"}, strength="beta"
    ),
    "ipo": Objective(
        ipo_objective, {"lr": 2.5e-4, "beta": 0.1}, {"pairs", "reference"}, strength="beta"
    ),
    "pl-dpo": Objective(
        pl_dpo_objective, {"lr": 5e-4, "beta": 0.5}, {"lists", "reference"}, strength="beta"
    ),
    "kto": Objective(
        kto_objective,
        {"lr": 1e-3, "beta": 0.5, "desirable": None, "desirable_weight": 1.0},
        {"reference", "mismatched", "batch"},
        strength="beta",
        conflict=kto_conflict,
        prepare=thumbs,
        advice=kto_advice,
    ),
    "rrhf": Objective(rrhf_objective, {"lr": 1e-3, "sft_weight": 20.0}, {"lists"}),
    "slic": Objective(slic_objective, {"lr": 1e-3, "sft_weight": 5.0}, {"pairs"}),
    "pro": Objective(
        pro_objective, {"lr": 1e-3, "sft_weight": 0.05}, {"lists"}, reward_norm=("global", "none")
    ),
    "rwr": Objective(
        rwr_objective,
        {"lr": 1e-3, "tau": 0.1},
        {"lists"},
        reward_norm=("global", "none"),
        strength="tau",
        residual=dro_residual,
    ),
    "sft": Objective(None, {"lr": 5e-4}),
}


def try_objective(c: Any) -> None:
    """Run the objective once on made-up numbers: a slip in a new one shows in the first second.

    It is given what its row says it needs and nothing else, and nan in the padded slots.
    Raises: ValueError where the row or the function is wrong.
    """
    objective = OBJECTIVES[c.objective]
    if unknown := [name for name in objective.defaults if not hasattr(c, name)]:
        raise ValueError(f"its row names {', '.join(unknown)}, which is no field of Config")
    if objective.residual and not objective.strength:
        raise ValueError("its row has a residual, and no strength that says whose optimum it is")
    if objective.loss is None:
        return
    generator, needs = torch.Generator().manual_seed(0), objective.needs
    rewards, logps, ref_logps = torch.rand(3, 2, 3, generator=generator)  # [B, M] each
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logps, ref_logps = (t.masked_fill(~mask, torch.nan) for t in (logps, ref_logps))
    x = Inputs(
        logps.requires_grad_(),
        ref_logps if "reference" in needs else None,
        rewards.masked_fill(~mask, torch.nan),
        mask,
        lengths=torch.tensor([[4, 4, 4], [4, 4, 0]]),
        values=rewards[:, 0] if "values" in needs else None,
        mismatched=(rewards[:, 1], rewards[:, 2]) if "mismatched" in needs else None,
    )
    try:
        loss = total(objective.loss(c, x))
        loss.backward()
        objective.metrics(c, x._replace(logps=logps.detach(), ref_logps=ref_logps))
    except Exception as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
        raise ValueError(f"{where}: {type(e).__name__}: {e} (it needs {sorted(needs)})") from e
    if not loss.isfinite() or not logps.grad.isfinite().all():
        raise ValueError(f"loss {loss.item()}, gradient {logps.grad.tolist()}: is a mask missing?")
