"""What several checks compute by, in float64 numpy; nothing here comes from the project's code."""

import numpy as np
import torch


def zeroed(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """x where the mask is True, 0 elsewhere."""
    return np.where(mask, x, 0.0)


def softmax(x: np.ndarray, mask: np.ndarray | None = None, *, axis: int = -1) -> np.ndarray:
    """Over an axis, of what is real; 0 elsewhere."""
    x = x if mask is None else np.where(mask, x, -np.inf)
    odds = np.exp(x - x.max(axis, keepdims=True))
    return odds / odds.sum(axis, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def token_logps(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """log-prob of every token [B, T]; 0 for the first, which nothing predicts."""
    logps = np.take_along_axis(log_softmax(logits)[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return np.pad(logps, ((0, 0), (1, 0)))


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    """Numbers as float32; integers and bools stay what they are."""
    return [torch.tensor(x, dtype=torch.float32 if x.dtype.kind == "f" else None) for x in arrays]
