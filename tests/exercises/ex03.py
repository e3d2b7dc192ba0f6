import math

import torch


def lire_grad(logps, rewards, mask, temperature):
    P = (logps / temperature).masked_fill(~mask, float("-inf")).softmax(-1)
    R = rewards.masked_fill(~mask, 0)
    baseline = (P * R).sum(-1, keepdim=True)  # [B, 1]
    return -P * (R - baseline) / temperature


def mean_score_grad(logps, lengths, rewards, mask, temperature):
    n = torch.where(mask, lengths, 1)
    return lire_grad(logps / n, rewards, mask, temperature) / n


def largest_grad(temperature):
    return 1 / (4 * temperature)  # P_1 P_2 (R_1 - R_2) / T


def lead(share, temperature):
    # P_1 (1 - P_1) = share / 4
    P = (1 + math.sqrt(1 - share)) / 2
    return temperature * math.log(P / (1 - P))
