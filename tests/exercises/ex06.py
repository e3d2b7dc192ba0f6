import copy

import torch
from torch.nn.functional import cross_entropy

EOS = 0

BUG_A = "padded length divides"
BUG_B = "EOS dropped"
BUG_C = "prompt in the sum"
BUG_D = "labels changed in place"
BUG_E = "dropout on"
BUG_F = "[B] against [B, 1]"


def program_a(logits, ids, mask):
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    scores = logits[:, :-1].flatten(0, 1)  # [B * (T - 1), V]
    losses = cross_entropy(scores, targets.flatten(), reduction="none")
    return losses.sum() / mask[:, 1:].sum()


def program_b(token_logps, ids, starts):
    place = torch.arange(ids.shape[1])  # [T]
    begun = place >= starts[:, None]
    mask = begun & ((ids == EOS).cumsum(-1) <= 1)  # all before the second
    return torch.where(mask, token_logps, 0.0).sum(-1)


def program_c(token_logps, ref_token_logps, prompt_lengths, lengths):
    place = torch.arange(token_logps.shape[1])  # [T]
    mask = (place >= prompt_lengths[:, None]) & (place < lengths[:, None])
    differences = token_logps - ref_token_logps
    return torch.where(mask, differences, 0.0).sum(-1)


def bug_changes_loss(objective):
    return objective == "dro"


def program_d(logits, labels):
    targets = labels[:, 1:].clone()
    targets[targets == -100] = 0
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    mask = labels[:, 1:] != -100
    return torch.where(mask, token_logps, 0.0).sum(-1)


def program_e(policy, ids, mask):
    reference = copy.deepcopy(policy).eval()
    reference.requires_grad_(False)
    with torch.no_grad():
        token_logps = reference(ids)
    return torch.where(mask, token_logps, 0.0).sum(-1)


def program_f(head, states, rewards, log_ratios, tau):
    values = head(states)[:, 0]
    targets = rewards - tau * log_ratios
    residuals = targets - values
    return 0.5 * residuals.square().mean()
