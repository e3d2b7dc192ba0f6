import torch

AGREE_AT_TAU = 1.0
PRINTED_AT_HALF = "between pi_ref and pi*"
PRINTED_AT_FIVE = "nowhere: it diverges"


def losses(logps, ref_logps, rewards, values, tau):
    ref_logps, rewards = ref_logps.detach(), rewards.detach()
    ratios = logps - ref_logps
    policy = -logps * (rewards - values.detach()) + tau / 2 * ratios.square()
    value = 0.5 * (rewards - tau * ratios.detach() - values).square()
    return policy, value


def end_point(tau, coefficient):
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    logits, value = mu.log().requires_grad_(), torch.zeros_like(mu[0]).requires_grad_()
    for _ in range(300):
        logps = logits.log_softmax(-1)
        ratios = logps - mu.log()
        policy_losses = -logps * (rewards - value.detach()) + coefficient * ratios.square()
        value_losses = 0.5 * (rewards - tau * ratios.detach() - value).square()
        loss = (mu * (policy_losses + value_losses)).sum()
        slopes = torch.autograd.grad(loss, (logits, value))
        if max(slope.abs().max() for slope in slopes) < 1e-5:
            break
        with torch.no_grad():
            logits -= 0.5 * slopes[0]
            value -= 0.5 * slopes[1]
    return logits.softmax(-1).detach()
