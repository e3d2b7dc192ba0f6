"""What the two papers compare with. Plain functions of log-probabilities, as lire.py and dro.py; flat tensors are [N]."""

import torch


def kto_loss(logps, ref_logps, desirable, mismatched_logps, mismatched_ref_logps, beta):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306), as the DRO paper uses it (beta = tau).

        l = logps - ref_logps        z = beta max(0, mean l of mismatched pairs), without gradient
        desirable    1 - sigmoid(beta l - z)          undesirable    1 - sigmoid(z - beta l)

    A mismatched pair is a prompt with another prompt's response; z estimates beta KL(policy || reference), and is 0 without any.

    Args: logps, ref_logps [N], sums over tokens, nats; desirable [N] bool; mismatched_logps, mismatched_ref_logps [K]; beta > 0.
    Returns: [N], in (0, 1). Raises: ValueError on other shapes, another dtype of `desirable` or beta <= 0.
    Differs from the paper: both kinds weigh 1, as in the DRO paper, which calls desirable what earns more than its batch's mean.

    >>> one = lambda x: torch.tensor([x])
    >>> kto_loss(one(-2.5), one(-3.0), one(True), one(-4.4), one(-4.0), 0.1)    # z = 0: 1 - sigmoid(0.05)
    tensor([0.4875])
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if logps.dim() != 1 or not logps.shape == ref_logps.shape == desirable.shape or desirable.dtype != torch.bool:
        raise ValueError(
            f"expected logps, ref_logps and bool desirable [N], got {tuple(logps.shape)}, {tuple(ref_logps.shape)} and "
            f"{desirable.dtype} {tuple(desirable.shape)}"
        )
    if mismatched_logps.dim() != 1 or mismatched_logps.shape != mismatched_ref_logps.shape:
        raise ValueError(
            f"expected mismatched log-probs [K], got {tuple(mismatched_logps.shape)} and {tuple(mismatched_ref_logps.shape)}"
        )
    wide = torch.promote_types(logps.dtype, torch.float32)  # half precision is computed in float32
    logps, ref_logps, other, other_ref = (
        x.to(wide) for x in (logps, ref_logps, mismatched_logps.detach(), mismatched_ref_logps)
    )
    z = beta * (other - other_ref).mean().clamp_min(0) if len(other) else 0.0
    margins = beta * (logps - ref_logps) - z
    return 1 - torch.sigmoid(torch.where(desirable, margins, -margins))
