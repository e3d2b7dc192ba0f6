CHOICES = ("falls to 0", "falls, but not to 0", "stays")
PREDICTED = {
    "single: residual/rms": "falls to 0",
    "lists: residual/rms": "falls, but not to 0",
    "lists: residual/within_prompt": "stays",
    "seeing: residual/rms": "falls to 0",
    "seeing: residual/within_prompt": "falls to 0",
}


def residuals(rewards, ratios, values, tau):
    values = values if values.dim() == 2 else values[:, None]
    return rewards - values - tau * ratios


def residual_rms(rewards, ratios, values, tau):
    return residuals(rewards, ratios, values, tau).square().mean().sqrt()


def within_prompt(rewards, ratios, values, tau):
    return residuals(rewards, ratios, values, tau).var(-1, correction=0).mean().sqrt()


def memorised_values(rewards, ratios, tau):
    return (rewards - tau * ratios).mean(-1)


def settings():
    return {"candidates": 1, "evolve": 0, "lr": 1e-9, "value_lr": 2e-3, "steps": 300}
