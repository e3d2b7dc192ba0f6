"""What a right answer to exercise 9 does."""

import tempfile

import numpy as np

import train
from exercises.judge import Property, Wrong, odd_number, same
from exercises.oracle import tensors
from experiments.cells import run_quietly

FORBIDDEN = ("dro", "objectives", "harness", "tests")
TRUE = {
    "single: residual/rms": "falls to 0",
    "lists: residual/rms": "falls, but not to 0",
    "lists: residual/within_prompt": "stays",
    "seeing: residual/rms": "falls to 0",
    "seeing: residual/within_prompt": "falls to 0",
}
# What may be set, and what holds where it is not.
START = {"candidates": 8, "evolve": 1, "steps": 120, "lr": 1e-3, "value_lr": None}
RUN = {  # the rest of the run: small enough for a few seconds
    **{"objective": "dro", "task": "tiny", "tau": 1.0, "device": "cpu", "seed": 0},
    **{"layers": 1, "heads": 2, "width": 64, "reference_steps": 60, "reference_batch": 8},
    **{"eval_prompts": 4, "eval_samples": 8, "eval_every": 50, "batch_size": 16},
    "iterate": 1,
}


def predictions(answer):
    given = answer.PREDICTED
    if not isinstance(given, dict):
        cause = "PREDICTED is a dictionary: keep it as the skeleton has it"
        raise Wrong("a dictionary", repr(given), cause)
    if all(value is None for value in given.values()):
        raise NotImplementedError("exercise 9: predictions")
    for name in TRUE:
        if given.get(name) not in answer.CHOICES:
            cause = "every line of PREDICTED has one of CHOICES, before anything is run"
            choices = ", ".join(answer.CHOICES)
            raise Wrong(f"{name}: one of {choices}", repr(given.get(name)), cause)
    if given == TRUE:
        print("predicted  all five predictions are true")
    for name, right in TRUE.items():
        if given[name] != right:
            print(f"predicted  {name} {given[name]}; it {right}")


def cases():
    for seed, (B, M, tau) in enumerate([(2, 3, 0.5), (5, 7, 2.0)]):
        rng = np.random.default_rng(seed)
        rewards, ratios = rng.normal(size=(2, B, M))
        yield rewards, ratios, rng.normal(size=B), tau


def residuals(rewards, ratios, values, tau):
    return rewards - (values if values.ndim == 2 else values[:, None]) - tau * ratios


def wrong_residuals(rewards, ratios, values, tau, measure):
    V = values if values.ndim == 2 else values[:, None]
    return {
        "tau is not used": measure(rewards - V - ratios),
        "the log-ratio is added: it is subtracted": measure(rewards - V + tau * ratios),
        "the value is added: it is subtracted": measure(rewards + V - tau * ratios),
        "the log-ratio is left out": measure(rewards - V),
        "the value is left out": measure(rewards - tau * ratios),
        "values may be [B, M] too: values[:, None] is for [B] alone": measure(
            rewards - values[:, None] - tau * ratios
        ),
    }


def rms_of(x):
    return np.sqrt((x**2).mean())


def within_of(x):
    return np.sqrt(x.var(-1).mean())


def rms(answer):
    for *case, tau in cases():
        for values in (case[2], residuals(case[0], case[1], case[2] + 0.5, tau)):
            given = case[0], case[1], values, tau
            x = residuals(*given)
            wrong = {
                "the root is missing: that is the mean square": (x**2).mean(),
                "the root of the sum, not of the mean": np.sqrt((x**2).sum()),
                "the mean of delta: what is above 0 and below cancels": x.mean(),
                "the mean of its size: rms squares first": np.abs(x).mean(),
                "the root of each prompt's mean, and then their mean: the root comes last": np.sqrt(
                    (x**2).mean(-1)
                ).mean(),
                "the deviation of delta: rms does not take the mean off": x.std(),
                **wrong_residuals(*given, rms_of),
            }
            same(answer.residual_rms(*tensors(*given[:3]), tau), rms_of(x), wrong)


def within(answer):
    for *case, tau in cases():
        for values in (case[2], residuals(case[0], case[1], case[2] + 0.5, tau)):
            given = case[0], case[1], values, tau
            x = residuals(*given)
            wrong = {
                "the variance divides by M - 1 (correction=0 divides by M)": np.sqrt(
                    x.var(-1, ddof=1).mean()
                ),
                "the root is missing: that is the mean variance": x.var(-1).mean(),
                "the mean of the deviations: the root comes last": x.std(-1).mean(),
                "the deviation over all responses: V does not cancel between prompts": x.std(),
                "the variance over prompts, where it is within each": np.sqrt(x.var(0).mean()),
                "the rms: the mean of a prompt is not taken off": rms_of(x),
                **wrong_residuals(*given, within_of),
            }
            same(answer.within_prompt(*tensors(*given[:3]), tau), within_of(x), wrong)


def memorised(answer):
    for rewards, ratios, _, tau in cases():
        right = (rewards - tau * ratios).mean(-1)
        wrong = {
            "the mean reward: the log-ratio's part, tau l, belongs to it": rewards.mean(-1),
            "tau is not used": (rewards - ratios).mean(-1),
            "tau l is added: it is subtracted": (rewards + tau * ratios).mean(-1),
            "the median has the least absolute error, not the least square": np.median(
                rewards - tau * ratios, -1
            ),
            "the sum over responses, not their mean": (rewards - tau * ratios).sum(-1),
            "one number for all prompts: V may give every prompt its own": np.full_like(
                right, right.mean()
            ),
        }
        same(answer.memorised_values(*tensors(rewards, ratios), tau), right, wrong)


def objection(own):
    """Why V would not memorise with these settings, or it could not be seen; empty if it would."""
    if not isinstance(own, dict):
        return f"settings() returns a dict, not a {type(own).__name__}"
    if unknown := set(own) - set(START):
        return f"{', '.join(sorted(map(str, unknown)))}: only {', '.join(START)} may be set"
    c = START | own
    numbers = {name: value for name, value in own.items() if (name, value) != ("value_lr", None)}
    if odd := odd_number(numbers, ("candidates", "evolve", "steps")):
        return odd
    if c["steps"] > 400:
        return f"{c['steps']} steps: at most 400, it is a classroom"
    if c["candidates"] > 1:
        return (
            f"{c['candidates']} responses a prompt of unlike reward: no number a prompt fits them "
            "all, so rms can't fall far below within_prompt; candidates 1"
        )
    if c["lr"] > 1e-5:
        return (
            f"lr {c['lr']:g}: the policy may learn too, and then the log does not say that V alone "
            "did; hold it still with a tiny lr, at most 1e-5"
        )
    if c["value_lr"] is None and c["lr"] < 3e-4:
        return f"V learns at {c['lr']:g}, by default the policy's rate: value_lr"
    if (c["value_lr"] or c["lr"]) < 3e-4:
        return (
            f"value_lr {c['value_lr']:g} is too small: V hardly moves in {c['steps']} steps. "
            "(Not set, it is lr.)"
        )
    return ""


def run(answer):
    if problem := objection(own := answer.settings()):
        raise Wrong("residual/rms falls to less than half, within_prompt stays", own, problem)
    with tempfile.TemporaryDirectory() as folder:
        config = train.Config(**RUN, **(START | own), out=f"{folder}/run")
        try:
            _, rows = run_quietly(config)
        except train.ConfigError as e:
            raise Wrong("a run", own, f"such a run is refused: {e}") from None
    print(verdict(rows, own["value_lr"]))


def verdict(rows, value_lr):
    """What a log says of V, in words. Raises: Wrong where it has not memorised."""
    rms = [row["residual/rms"] for row in rows]
    inside = [row["residual/within_prompt"] for row in rows if "residual/within_prompt" in row]
    last = sum(rms[-3:]) / 3  # of single batches
    said = f"rms {rms[0]:.2f} -> {last:.2f}, within_prompt {inside[0]:.2f} -> {inside[-1]:.2f}"
    if last > rms[0] / 2:
        cause = "V has not memorised yet: more steps"
        if value_lr > 1e-2:
            cause = f"value_lr {value_lr:g} is too high: V jumps about and fits nothing"
        elif value_lr < 3e-3:
            cause += ", or a higher value_lr"
        raise Wrong("rms falls to less than half of what it began with", said, cause)
    if inside[-1] < inside[0] / 2:
        raise Wrong("within_prompt stays", said, "the policy has learnt too: hold it still")
    return said


PROPERTIES = [
    Property("predictions", 1, predictions),
    Property("residual/rms", 2, rms),
    Property("residual/within_prompt", 2, within),
    Property("the values that V learns by heart", 2, memorised),
    Property("a run in which V memorises", 3, run),
]
