"""One step of learning: what the objective sees of a batch, the update, and what is logged."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import Batch
from harness.config import Config
from harness.pool import World, precision
from model import ValueNetwork, response_logps
from objectives import OBJECTIVES, Inputs, Losses, common_metrics, total


def lr_at(step: int, steps: int, peak: float) -> float:
    """Warm-up over the first 3 % of the steps, then straight to 0; `step` steps are done."""
    warm = max(1, round(0.03 * steps))
    return peak * min((step + 1) / warm, (steps - step) / max(steps - warm, 1))


def update(
    optimizer: torch.optim.Optimizer, loss: Tensor, step: int, steps: int, clip: float
) -> list[float]:
    """Backward; clip each parameter group (a network each) by itself; one step at its own rate.

    Args: step: the first is 1.
    Returns: the groups' gradient norms before clipping.
    Raises: FloatingPointError where one, or the loss, is not finite; nothing is changed then.
    """
    optimizer.zero_grad()
    loss.backward()
    groups = optimizer.param_groups
    norms = [nn.utils.clip_grad_norm_(group["params"], clip) for group in groups]
    # Here a GPU is waited for, and not behind its optimiser: the next batch is made meanwhile.
    norms = [norm.item() for norm in norms]
    if not all(map(math.isfinite, [loss.item(), *norms])):
        shown = " and ".join(f"{norm:g}" for norm in norms)
        raise FloatingPointError(f"step {step}: loss is {loss.item():g}, gradient norm {shown}")
    for group in groups:
        group["lr"] = lr_at(step - 1, steps, group["peak"])
    optimizer.step()
    return norms


def objective_inputs(
    c: Config, world: World, state: Any, reference: nn.Module, batch: Batch, logps: Tensor
) -> Inputs:
    """x of a batch and its log-probs [B, M], with V(x) and mismatched pairs where needed."""
    values = prompt_values(c, state.value_network, batch) if state.value_network else None  # [B]
    mismatched = None
    if "mismatched" in OBJECTIVES[c.objective].needs:
        mismatched = mismatched_logps(world, state.policy, reference, batch)
    mask, lengths = batch.candidate_mask, batch.response_mask.sum(-1)
    return Inputs(logps, batch.ref_logps, batch.rewards, mask, lengths, values, mismatched)


def policy_logps(c: Config, world: World, policy: nn.Module, batch: Batch) -> Tensor:
    """log pi(y | x) [B, M] of every candidate of a batch."""
    return in_parts(c, batch, lambda part: response_logps(policy, part, world.allowed))


def prompt_values(c: Config, value: ValueNetwork, batch: Batch) -> Tensor:
    """V(x) [B] of a batch's prompts; with --value batch their mean, for all of them alike."""
    values = in_parts(c, batch, lambda part: value(part.prompt_ids, part.prompt_mask))
    return values.mean().expand_as(values) if c.value == "batch" else values


def in_parts(c: Config, batch: Batch, score: Callable[[Batch], Tensor]) -> Tensor:
    """score(batch) [B, ...], of --grad-accum parts of the batch one after the other.

    Each part is scored once more in the backward pass (activation checkpointing), so that the
    activations of one part alone are held at a time: a third more work. The loss is of the whole
    batch, as ever.
    """
    if c.grad_accum == 1:
        return score(batch)
    size = -(-len(batch.prompt_ids) // c.grad_accum)
    tensors = {name: x.split(size) for name, x in vars(batch).items() if x is not None}
    scores = []
    for part in zip(*tensors.values()):
        # Each part casts the weights by itself: what the parts add to a weight's gradient is then
        # added up in float32 and not in bfloat16.
        torch.clear_autocast_cache()
        part = Batch(**dict(zip(tensors, part)))
        scores.append(checkpoint(score, part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(scores)


@torch.no_grad()
def mismatched_logps(
    world: World, policy: nn.Module, reference: nn.Module, batch: Batch
) -> tuple[Tensor, Tensor]:
    """KTO's mismatched pairs, prompt i with the first candidate of prompt i + 1.

    Returns: log-probs of policy and reference, [K] each, K = B less the pairs of two equal prompts.
    """
    unlike = (batch.prompt_ids != batch.prompt_ids.roll(-1, 0)).any(-1)  # [B]
    others = dataclasses.replace(
        batch,
        response_ids=batch.response_ids[:, :1].roll(-1, 0),
        response_mask=batch.response_mask[:, :1].roll(-1, 0),
    )
    models = (policy, reference)
    return tuple(response_logps(model, others, world.allowed)[unlike, 0] for model in models)


@torch.no_grad()
def with_reference(
    c: Config, world: World, reference: nn.Module, batch: Batch, x: Inputs
) -> Inputs:
    """x with reference log-probs, which the log shows, where the objective does without them."""
    if x.ref_logps is not None:
        return x
    with precision(c):
        return x._replace(ref_logps=response_logps(reference, batch, world.allowed))


@torch.no_grad()
def step_metrics(
    c: Config, state: Any, x: Inputs, losses: Losses, grad_norms: list[float]
) -> dict[str, float | None]:
    """A row of log.jsonl; docs/metrics.md explains each of its names."""
    row = {"step": state.step, "round": state.round_index, "loss": total(losses).item()}
    row |= {"learning_rate": state.optimizer.param_groups[0]["lr"], "grad_norm": grad_norms[0]}
    if len(grad_norms) > 1:
        row["value/grad_norm"] = grad_norms[1]
    own = OBJECTIVES[c.objective].metrics(c, x)
    tensors = {**losses, **common_metrics(c, x), **own}
    row |= {name: values.mean().item() for name, values in tensors.items()}
    return finite(row | state.pool_metrics)


def finite(metrics: dict) -> dict:
    """nan and inf become None: log.jsonl and metrics.json are plain JSON."""
    unknown = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
    return metrics | dict.fromkeys(unknown)
