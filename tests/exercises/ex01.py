import torch


def sequence_logps(logits, ids, mask):
    logps = logits[:, :-1].float().log_softmax(-1)  # [B, T - 1, V]
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0]  # [B, T - 1]
    return torch.where(mask[:, 1:], logps, 0.0).sum(-1)
