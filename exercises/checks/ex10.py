"""What a right answer to exercise 10 does."""

import tempfile

import torch

import train
from exercises.judge import Property, Wrong, not_a, odd_number
from experiments.cells import run_quietly
from objectives import OBJECTIVES, Objective

FORBIDDEN = ("lire", "dro", "baselines", "objectives", "harness", "tests")
SEEDS = (0, 1, 2)
LEVELS = (0.35, 0.5, 0.6)  # efficiencies; each is worth two points
START = {
    **{"candidates": 4, "sample_temperature": 0.2, "evolve": 6, "iterate": 1, "temperature": 2.0},
    **{"sft_weight": 0.0, "score": "sum", "reward_norm": "softmax", "lr": 2e-3},
}
LIRE_ALONE = ("temperature", "sft_weight", "score", "reward_norm")
MOST = {"candidates": 16, "evolve": 12, "iterate": 20}
RUN = {  # the rest of the run: small enough for a few seconds
    **{"objective": "lire", "task": "tiny", "device": "cpu", "steps": 120},
    **{"layers": 1, "heads": 2, "width": 64},
    **{"reference_steps": 150, "reference_batch": 8, "reference_lr": 3e-3},
    **{"eval_prompts": 20, "eval_samples": 16, "eval_every": 20, "batch_size": 16},
}


def number(got, right, mistakes):
    """Is a float what was expected? mistakes {sentence: the number that it gives}."""
    if not isinstance(got, (int, float)) or isinstance(got, bool):
        raise Wrong(f"a number, {right:g}", repr(got), not_a("float", got))
    if abs(got - right) < 1e-6:
        return
    mistakes = mistakes | {"a share is asked for, not per cent": 100 * right}
    causes = [cause for cause, value in mistakes.items() if abs(got - value) < 1e-6]
    raise Wrong(f"{right:g}", f"{got:g}", causes[0] if causes else "count the example by hand")


def share(lists, key=tuple):
    """The mean share of candidates that differ in key(ids)."""
    return sum(len(set(map(key, own))) / len(own) for own in lists) / len(lists)


def different(answer):
    a, b, c, d, e = [5, 9], [7, 9], [8, 9], [4, 9], [6, 9]
    lists = [[a, a, b], [a, b, c], [d, d, d], [e, e, a], [[1, 9], [2, 9]]]
    # The same ids in another order, the same ids another number of times.
    lists += [[[5, 7, 9], [7, 5, 9], [3, 9]], [[5, 5, 9], [5, 9], [3, 9], [2, 9], [5, 9]]]
    every = [tuple(ids) for own in lists for ids in own]
    count, right = sum(len(set(map(tuple, own))) for own in lists), share(lists)
    mistakes = {
        "a mean over all candidates: every list counts the same, however long it is": (
            count / len(every)
        ),
        "what differs in the whole pool is counted, not what differs within each list": (
            len(set(every)) / len(every)
        ),
        "the share of lists without a double (or //): a list counts by how many of it differ": 3
        / 7,
        "the share of doubles: the different ones are asked for": 1 - right,
        "the number of different candidates in a list, not their share": count / 7,
        "a count over all lists, not a share": count,
        "only the lengths are compared: two responses are alike where all ids are": (
            share(lists, len)
        ),
        "a set of ids forgets how often each is there: 5, 5, 9 is not 5, 9": (
            share(lists, frozenset)
        ),
        "sorted ids forget their order: 5, 7, 9 and 7, 5, 9 are two responses": (
            share(lists, lambda ids: tuple(sorted(ids)))
        ),
    }
    number(answer.different(lists), right, mistakes)


def tied(answer):
    all_alike = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [2.0, 2.0], [-1.0, -1.0]]
    some_alike = [[1.0, 2.0, 1.0], [4.0, 4.0, 3.0]]
    unlike = [[3.0, 4.0, 5.0], [7.0, 8.0], [9.0, 8.0], [0.2, 0.4], [1.5, -1.5]]
    mistakes = {
        "a list with any two equal rewards is counted: all of them have to be equal": 6 / 11,
        "a list whose single reward is 0 is tied too": 3 / 11,
        "the share of lists that are not tied": 7 / 11,
        "a count, not a share": 4,
        "rewards are rounded: 0.2 and 0.4 are not equal": 5 / 11,
        "0: an integer division (//)?": 0,
    }
    number(answer.tied(all_alike + some_alike + unlike), 4 / 11, mistakes)


def objection(own):
    """What is wrong with settings, in words; empty where nothing is."""
    if not isinstance(own, dict):
        return f"settings() returns a dict, not a {type(own).__name__}"
    if unknown := set(own) - set(START):
        return f"{', '.join(sorted(map(str, unknown)))}: only {', '.join(START)} may be set"
    numbers = {name: value for name, value in own.items() if not isinstance(START[name], str)}
    if odd := odd_number(numbers, ("candidates", "evolve", "iterate")):
        return odd
    for name, most in MOST.items():
        if own.get(name, 0) > most:
            return f"{name} {own[name]}: at most {most}, it is a classroom"
    return ""


def try_loss(loss):
    """An own loss on lists as a run has them. Raises: Wrong where a run could not train with it."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor([4, 3, 2])[:, None]
    drawn = torch.randn(3, 3, 4, generator=generator).requires_grad_()
    logps, ref_logps, rewards = drawn.masked_fill(~mask, torch.nan)
    ref_logps, rewards = ref_logps.detach(), rewards.detach()
    got = loss(logps, ref_logps, rewards, mask)
    if not isinstance(got, torch.Tensor):
        raise Wrong("a tensor [B]", repr(got), f"your loss: {not_a('tensor', got)}")
    if got.shape != (3,):
        cause = f"your loss returns a tensor {list(got.shape)}, [B] is asked for: one loss a list"
        raise Wrong("a tensor [3]", f"a tensor {list(got.shape)}", cause)
    if not got.isfinite().all():
        cause = "nan from a slot that is not real reaches your loss (masked_fill, torch.where)"
        raise Wrong("three finite losses", got, cause)
    if not got.requires_grad:
        raise Wrong("a loss with a gradient", got, "no gradient reaches logps: detach, item?")


RUNS = {}  # of this answer, made once: the mean efficiency


def efficiency(answer):
    """The mean efficiency of the answer's run over SEEDS, and its rounds, printed."""
    if "mean" in RUNS:
        return RUNS["mean"]
    own = answer.settings()
    if problem := objection(own):
        raise Wrong("a dict of settings", own, problem)
    settings = {**RUN, **START, **own}
    loss_of = getattr(answer, "loss", None)
    if loss_of is not None:
        try_loss(loss_of)
        settings |= {"objective": "own"} | dict.fromkeys(LIRE_ALONE)
        loss = lambda c, x: {"loss": loss_of(x.logps, x.ref_logps, x.rewards, x.mask)}
        OBJECTIVES["own"] = Objective(loss, {}, {"lists", "reference"})
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            config = train.Config(**settings, seed=seed, out=f"{folder}/run")
            try:
                metrics, rows = run_quietly(config)
            except (train.ConfigError, FloatingPointError) as e:
                raise Wrong("a run", own, f"such a run ends early: {e}") from None
        found.append(metrics["efficiency"] or 0.0)
        show(seed, rows, metrics)
    RUNS["mean"] = sum(found) / len(found)
    print(f"mean efficiency {RUNS['mean']:.2f}")
    return RUNS["mean"]


def show(seed, rows, metrics):
    """Print what the rounds of a run were like."""
    last = {row["round"]: row for row in rows}  # of each round
    for word, name in (("different", "lists/distinct"), ("tied lists", "lists/tied")):
        shares = " ".join(f"{row[name]:4.0%}" for row in last.values())
        print(f"seed {seed}  {word:12} {shares}")
    known = metrics["efficiency"]
    shown = f"{known:.2f}" if known is not None else "- (it has hardly moved)"
    print(
        f"seed {seed}  reward {metrics['policy_reward']:.2f}, KL {metrics['kl']:.2f}, "
        f"efficiency {shown}"
    )


def reaches(level):
    def holds(answer):
        reached = efficiency(answer)
        if reached < level:
            cause = advice(answer.settings(), getattr(answer, "loss", None) is not None, reached)
            raise Wrong(f"at least {level}", f"{reached:.2f}", cause)

    return holds


def advice(own, has_loss, reached):
    """What to look at next, of the settings that were tried, or of a loss of the student's own."""
    c = {**START, **own}
    if has_loss and reached < 0:
        return "the reward falls below the reference's: the sign of your loss is turned"
    if c["lr"] > 5e-3:
        return f"lr {c['lr']:g} is too high: every round moves the policy far past what it has seen"
    if c["lr"] < 3e-4:
        return f"lr {c['lr']:g} is too low: 120 updates hardly move the policy, look at the KL"
    if not has_loss and c["temperature"] < 1:
        return f"P is one-hot at T = {c['temperature']:g}: no list teaches anything (exercise 4)"
    if c["sample_temperature"] < 0.7:
        return "cold samples are alike from the first round on: see how many differ in round 1"
    if c["candidates"] < 8:
        return "few candidates rarely hold both a good and a bad answer: more of them"
    if reached >= 0.45:
        norm = "" if has_loss else ", or another reward_norm (zscore)"
        return f"the pool lives. More of it: more candidates, more rounds{norm}"
    if has_loss:
        return "in which round do candidates become alike? A smaller lr, or another loss"
    if c["temperature"] < 4:
        return "P is nearly one-hot at this T, and such lists teach nothing (exercise 4)"
    return "in which round do candidates become alike? A smaller lr, or an anchor (sft_weight)"


PROPERTIES = [
    Property("how many candidates differ", 2, different),
    Property("how many lists are tied", 2, tied),
    *(Property(f"mean efficiency of {level}", 2, reaches(level)) for level in LEVELS),
]
