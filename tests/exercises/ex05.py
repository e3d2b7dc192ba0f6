import math

import torch


def lire_weight(margin, reward_gap, temperature):
    P_w, P_l = torch.sigmoid(margin / temperature), torch.sigmoid(-margin / temperature)
    return P_w * P_l * math.tanh(reward_gap / 2) / temperature


def dpo_weight(margin, beta):
    return beta * torch.sigmoid(-beta * margin)


def peak(reward_gap, temperature):
    return 0.0, math.tanh(reward_gap / 2) / (4 * temperature)


def limits(reward_gap, temperature, beta):
    return 0.0, beta


def flat_limit(rewards):
    mean = rewards.mean(-1, keepdim=True)
    return -(rewards - mean) / rewards.shape[-1]
