WHY_ZERO = "P sums to 1, whatever the s_j are"


def lire_grad(logps, rewards, mask, temperature):
    P = (logps / temperature).masked_fill(~mask, float("-inf")).softmax(-1)
    R = rewards.masked_fill(~mask, 0)
    baseline = (P * R).sum(-1, keepdim=True)  # [B, 1]
    return -P * (R - baseline) / temperature


def one_hot_grad(rest, temperature):
    step = rest * (1 - rest) / temperature  # the list's mean reward is rest
    return step, -step, 0.0


def mean_score_grad(logps, lengths, rewards, mask, temperature):
    return lire_grad(logps / lengths, rewards, mask, temperature) / lengths
