def candidate_probs(logps, mask, temperature):
    scores = (logps / temperature).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def lire_loss(logps, rewards, mask, temperature):
    P = candidate_probs(logps, mask, temperature)
    R = rewards.detach().masked_fill(~mask, float("-inf")).softmax(-1)
    return -(P * R).sum(-1)
