"""What was learnt: a task's reward, win rate, KL, optimum; scores of a file's held-out lists."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dro
import frontier
from data import Example
from harness.config import Config
from harness.pool import (
    World,
    decode,
    normalise,
    precision,
    prompt_batch,
    reward_list,
    rng,
    sample_lists,
    score_lists,
    with_responses,
)
from harness.run import save
from harness.update import finite, prompt_values
from objectives import OBJECTIVES, correlation
from records import short

Lists = list[list[list[int]]]  # responses, as token ids, of each prompt
Answers = list[tuple[Example, list, list]]  # a prompt, the policy's and the reference's responses


def standard_error(values: Tensor) -> float:
    """Of the mean of [B] values; nan for a single one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def mean_length(lists: Lists) -> float:
    """Tokens of a response."""
    lengths = [len(ids) for responses in lists for ids in responses]
    return sum(lengths) / len(lengths)


def reward_tensor(world: World, examples: list[Example], lists: Lists) -> Tensor:
    """The task's reward of every response, [B, N] float64."""
    rewards = [reward_list(world, e.prompt, ids) for e, ids in zip(examples, lists)]
    return torch.tensor(rewards, dtype=torch.float64)


def enumerate_responses(world: World) -> list[list[int]]:
    """All responses of a task of few words (tiny: 584) as token ids with EOS, shortest first."""
    words = [world.enc.encode_single_token(" " + word) for word in world.task.words]
    lengths = range(1, world.task.max_response)
    sentences = itertools.chain(*(itertools.product(words, repeat=n) for n in lengths))
    return [[*ids, world.enc.eot_token] for ids in sentences]


# -------------------------------------------------------------------------------------------- tasks


def evaluate_task(
    c: Config,
    world: World,
    policy: nn.Module,
    reference: nn.Module,
    examples: list[Example],
    split: str,
    state: Any = None,
    enumerated: bool | None = None,
) -> tuple[dict, Answers, dict]:
    """Policy against reference, best of 8 and the optimum at the same KL, on `examples`.

    Args: split: names the random numbers; state: where DRO keeps its value network and the scale of
        its rewards; enumerated: take the optimum over all responses (default: where they are few).
    Returns: the metrics; the answers; what a picture shows: the frontier, and V beside V*.
    """
    if enumerated is None:
        enumerated = bool(world.task.words)

    # Sample both models at temperature 1, and reward every response.
    lists, rewards, n = {}, {}, c.eval_samples
    for who, model in (("reference", reference), ("policy", policy)):
        generator = rng(c.seed, "evaluate", split, who, device=c.device)
        lists[who] = sample_lists(c, world, model, examples, n, generator)
        rewards[who] = reward_tensor(world, examples, lists[who])  # [B, n]

    # The responses that the optimum is taken over: all there are, or the samples of both models.
    if enumerated:
        both = [enumerate_responses(world)] * len(examples)
        all_rewards = reward_tensor(world, examples, both)
    else:
        both = [first + second for first, second in zip(lists["reference"], lists["policy"])]
        all_rewards = torch.cat([rewards["reference"], rewards["policy"]], 1)
    pool = with_responses(examples, both)
    # [B, N] each.
    ref_logps, logps = (
        torch.tensor(score_lists(c, world, model, pool), dtype=torch.float64)
        for model in (reference, policy)
    )
    if enumerated:
        log_b, log_w = ref_logps, logps
        kls = dro.kl_divergence(logps, ref_logps)  # [B]
    else:
        log_b, log_w = frontier.mixture_weights(logps - ref_logps)
        kls = (logps - ref_logps)[:, n:].mean(-1)  # [B], over the policy's own samples
    best = frontier.frontier(log_b, log_w, all_rewards, seed=c.seed)
    metrics = reward_metrics(rewards["policy"], rewards["reference"])
    metrics |= optimum_metrics(kls, best, enumerated)
    metrics |= prompt_deviation(log_b, all_rewards, best.reference_reward)
    curve = torch.stack(frontier.frontier_curve(log_b, all_rewards), -1).mean(1)  # [G, 2]
    picture = {
        "frontier": curve.tolist(),
        "policy": [best.kl, best.policy_reward],
        "reference": [0.0, best.reference_reward],
    }

    # An objective that aims at pi* of its own strength: how near is it?
    objective = OBJECTIVES[c.objective]
    if objective.residual and state and (state.reward_scale or c.reward_norm == "none"):
        scaled = normalise(all_rewards, state.reward_scale)
        own, values = against_the_optimum(
            c, world, state, examples, log_b, log_w, scaled, enumerated
        )
        metrics, picture = metrics | own, picture | values

    for who in ("policy", "reference"):
        metrics |= answer_metrics(world, examples, lists[who], who)
    return finite(metrics), list(zip(examples, lists["policy"], lists["reference"])), picture


def reward_metrics(policy: Tensor, reference: Tensor) -> dict:
    """Mean rewards, best of 8 and win rate, of the rewards [B, n] of both models' samples."""
    n = reference.shape[1]
    wins = policy[:, :, None] - reference[:, None, :]  # [B, n, n]
    best_of_8 = math.nan
    if n >= 8:
        best_of_8 = reference[:, : n - n % 8].unflatten(1, (-1, 8)).max(-1).values.mean().item()
    return {
        "policy_reward": policy.mean().item(),
        "reference_reward": reference.mean().item(),
        "best_of_8_reward": best_of_8,
        "win_rate": ((wins > 0).double() + 0.5 * (wins == 0).double()).mean().item(),
    }


def optimum_metrics(kls: Tensor, best: frontier.Frontier, enumerated: bool) -> dict:
    """The KL, and how near the policy is to the best one of its KL."""
    kl = kls.mean().item()
    return {
        "kl": kl,
        "kl_se": standard_error(kls),
        "optimal_kl": best.optimal_kl,
        "optimal_tau": best.tau,
        "optimal_reward": best.optimal_reward,
        "optimal_reward_se": best.optimal_reward_se,
        "effective_sample_size": best.effective_sample_size,
        **frontier.reported_efficiency(best, kl, enumerated),
    }


def prompt_deviation(log_b: Tensor, rewards: Tensor, mean: float) -> dict:
    """How far prompts differ in what is possible: V* at tau = the reference's reward deviation."""
    deviation = (log_b.exp() * (rewards - mean) ** 2).sum(-1).mean().sqrt().item()
    values = dro.optimal_value(log_b, rewards, deviation) if deviation else torch.zeros(1)
    return {"value_deviation": values.std(correction=0).item(), "reward_deviation": deviation}


def against_the_optimum(
    c: Config,
    world: World,
    state: Any,
    examples: list[Example],
    log_b: Tensor,
    log_w: Tensor,
    rewards: Tensor,
    enumerated: bool,
) -> tuple[dict, dict]:
    """pi* and V* at the objective's own strength beside policy and value network.

    Args: log_b, log_w [B, N], as `frontier.frontier`; rewards [B, N], as the objective sees them;
        enumerated: they are all there are.
    Returns: metrics; for the picture, V and V* of every prompt.
    """
    tau = getattr(c, OBJECTIVES[c.objective].strength)
    optimal_values = dro.optimal_value(log_b, rewards, tau)  # [B]
    optimum = dro.optimal_logps(log_b, rewards, tau)
    # A few samples with nearly all the weight say too little of KL(pi*, policy).
    enough = enumerated or frontier.effective_sample_size(optimum) >= frontier.ENOUGH_SAMPLES
    distance = dro.kl_divergence(optimum, log_w).mean().item()
    metrics = {
        "kl_from_optimum": distance if enough else math.nan,
        "optimum_kl": dro.kl_divergence(optimum, log_b).mean().item(),  # KL(pi*, reference)
    }
    if not state.value_network:
        return metrics, {}
    with torch.no_grad(), precision(c):
        batch = prompt_batch(c, world, examples)
        values = prompt_values(c, state.value_network, batch).double().cpu()  # [B]
    metrics["value_error"] = (values - optimal_values).abs().mean().item()
    metrics["value_correlation"] = correlation(values, optimal_values).item()
    return metrics, {"value": values.tolist(), "optimal_value": optimal_values.tolist()}


def answer_metrics(world: World, examples: list[Example], lists: Lists, who: str) -> dict:
    """Length and variety of the answers, what their rewards are made of, and a control."""
    n = len(lists[0])
    distinct = sum(len({tuple(ids) for ids in responses}) for responses in lists)
    metrics = {f"{who}_length": mean_length(lists), f"{who}_distinct": distinct / (len(lists) * n)}
    breakdowns = [
        world.task.breakdown(e.prompt, decode(world, ids))
        for e, responses in zip(examples, lists)
        for ids in responses
    ]
    for part in breakdowns[0]:
        metrics[f"{who}_{part}"] = sum(counts[part] for counts in breakdowns) / len(breakdowns)
    # The same answers under another prompt: what they still earn does not come from reading theirs.
    others = examples[1:] + examples[:1]
    rewards = [reward_list(world, e.prompt, ids) for e, ids in zip(others, lists)]
    metrics[f"shuffled_{who}_reward"] = sum(map(sum, rewards)) / (len(lists) * n)
    return metrics


# -------------------------------------------------------------------------------------------- files


def evaluate_lists(c: Config, world: World, policy: nn.Module, reference: nn.Module) -> list[dict]:
    """Scores of every held-out list of two responses or more, a row each.

    The scores: sum of token log-probs, mean per token, log-ratio to the reference, and, beside
    them, the length in characters. Does one of them find the better response?
    """
    examples = [e for e in world.heldout if len(e.response_ids) > 1]
    scored = zip(
        examples,
        score_lists(c, world, policy, examples),
        score_lists(c, world, reference, examples),
    )
    rows = []
    for e, logps, ref_logps in scored:
        lengths = [len(ids) for ids in e.response_ids]
        scores = {
            "policy_sum": logps,
            "policy_mean": [logp / length for logp, length in zip(logps, lengths)],
            "policy_ratio": [logp - ref_logp for logp, ref_logp in zip(logps, ref_logps)],
            "reference_sum": ref_logps,
            "reference_mean": [logp / length for logp, length in zip(ref_logps, lengths)],
            "longest": [len(decode(world, ids)) for ids in e.response_ids],
        }
        rows.append({"prompt": e.prompt, "rewards": e.rewards, **scores})
    return rows


def list_outcome(scores: list[float], rewards: list[float]) -> tuple[float, float, int]:
    """One list: reward of the top-scored response, pairs ordered rightly, pairs of unlike rewards.

    At a tie of scores the top reward is the mean of the tied, and a pair counts 1/2.

    >>> list_outcome([0.3, 0.1, 0.2], [5.0, 1.0, 1.0])
    (5.0, 2.0, 2)
    """
    places = range(len(rewards))
    pairs = [(i, j) for i in places for j in range(i) if rewards[i] != rewards[j]]
    right = 0.0
    for i, j in pairs:
        ordered = float((scores[i] > scores[j]) == (rewards[i] > rewards[j]))
        right += 0.5 if scores[i] == scores[j] else ordered
    top = [reward for score, reward in zip(scores, rewards) if score == max(scores)]
    return sum(top) / len(top), right, len(pairs)


def list_metrics(rows: list[dict]) -> dict:
    """top1_reward and pair_accuracy of every score over rows of `evaluate_lists`.

    mean_reward and best_reward are what picking at random and picking the best would earn.
    """
    rewards = [row["rewards"] for row in rows]
    metrics = {
        "mean_reward": sum(sum(r) / len(r) for r in rewards) / len(rows),
        "best_reward": sum(map(max, rewards)) / len(rows),
    }
    for score in list(rows[0])[2:]:
        outcomes = [list_outcome(row[score], row["rewards"]) for row in rows]
        top, right, pairs = map(sum, zip(*outcomes))
        metrics[f"top1_reward_{score}"] = top / len(rows)
        metrics[f"pair_accuracy_{score}"] = right / pairs if pairs else None
    metrics["longer_accuracy"] = metrics.pop("pair_accuracy_longest")
    return metrics


# ------------------------------------------------------------------------------------ while it runs


def sampled_kl(
    c: Config,
    world: World,
    policy: nn.Module,
    reference: nn.Module,
    examples: list[Example],
    M: int,
    name: Any,
) -> tuple[Lists, Tensor]:
    """M policy samples a prompt, and log-ratios [B, M] whose mean estimates KL(pi || pi_ref)."""
    generator = rng(c.seed, "quick", name, device=c.device)
    lists = sample_lists(c, world, policy, examples, M, generator)
    pool = with_responses(examples, lists)
    logps, ref_logps = (
        torch.tensor(score_lists(c, world, model, pool)) for model in (policy, reference)
    )
    return lists, logps - ref_logps


def quick_evaluation(c: Config, world: World, state: Any, reference: nn.Module, step: int) -> dict:
    """Reward and KL of a few policy samples on held-out prompts: the live line and the curves.

    Where the objective has a residual, its deviation within a prompt is told too: V cancels there,
    so a value network that has memorised its prompts can't hide it behind a small loss.
    """
    examples = world.heldout[:: max(1, len(world.heldout) // 32)][:32]
    lists, ratios = sampled_kl(c, world, state.policy, reference, examples, 8, step)
    metrics, rewards = {"kl": ratios.mean().item()}, None
    if world.task:
        rewards = [reward_list(world, e.prompt, ids) for e, ids in zip(examples, lists)]
        metrics["reward"] = torch.tensor(rewards).mean().item()
    residual = OBJECTIVES[c.objective].residual
    if residual:
        if world.task:
            scored = [(torch.tensor(rewards), ratios)]
        else:
            scored = scored_lists(c, world, state.policy, reference, examples)
        variances = [
            residual(c, normalise(own, state.reward_scale), log_ratios).var(-1, correction=0)
            for own, log_ratios in scored
        ]
        metrics["residual/within_prompt"] = math.nan
        if variances:
            metrics["residual/within_prompt"] = torch.stack(variances).mean().sqrt().item()
    return finite(metrics)


def scored_lists(
    c: Config, world: World, policy: nn.Module, reference: nn.Module, examples: list[Example]
) -> list[tuple[Tensor, Tensor]]:
    """(rewards, log-ratios) of every held-out list of two responses or more, [M] each."""
    lists = [e for e in examples if len(e.response_ids) > 1]
    logps, ref_logps = (score_lists(c, world, model, lists) for model in (policy, reference))
    return [
        (torch.tensor(e.rewards), torch.tensor(new) - torch.tensor(old))
        for e, new, old in zip(lists, logps, ref_logps)
    ]


# --------------------------------------------------------------------------------------- at the end


def evaluate(c: Config, world: World, state: Any, reference: nn.Module) -> tuple[dict, Answers]:
    """The metrics of a finished run, and its answers to held-out prompts.

    Leaves the frontier of a task in frontier.json, the scores of a file's lists in heldout.jsonl.
    """

    def choose(examples):
        return random.Random(0).sample(examples, min(c.eval_prompts, len(examples)))

    policy, out, heldout = state.policy.eval(), Path(c.out), choose(world.heldout)
    if world.task:
        metrics, answers, picture = evaluate_task(
            c, world, policy, reference, heldout, "heldout", state
        )
        save(json.dumps(picture), out / "frontier.json")
        splits = {"ood": world.ood}
        if world.task.words:  # is what it learnt exact?
            splits["train"] = world.train
        for split, examples in splits.items():
            if examples:
                own = evaluate_task(c, world, policy, reference, choose(examples), split, state)[0]
                metrics |= {f"{split}_{name}": value for name, value in own.items()}
        return finite(metrics), answers

    rows = evaluate_lists(c, world, policy, reference)
    save("".join(json.dumps(row) + "\n" for row in rows), out / "heldout.jsonl")
    if not rows:
        print("the held-out lists have a single response each: no list metrics")
    lists, ratios = sampled_kl(c, world, policy, reference, heldout, 8, "final")
    generator = rng(c.seed, "final", device=c.device)
    ref_lists = sample_lists(c, world, reference, heldout, 8, generator)
    kls = ratios.mean(-1)  # [B]
    metrics = list_metrics(rows) if rows else {}
    metrics |= {"kl": kls.mean().item(), "kl_se": standard_error(kls)}
    metrics |= {"policy_length": mean_length(lists), "reference_length": mean_length(ref_lists)}
    return finite(metrics), list(zip(heldout, lists, ref_lists))


def side_by_side(world: World, answers: Answers, prompts: int = 3, each: int = 3) -> str:
    """Some prompts with answers of reference and policy, on a task each after its reward."""
    lines = []
    for example, policy_lists, ref_lists in answers[:: max(1, len(answers) // prompts)][:prompts]:
        lines.append(example.prompt if len(example.prompt) <= 300 else short(example.prompt, 300))
        for who, responses in (("reference", ref_lists), ("policy", policy_lists)):
            for ids in responses[:each]:
                text = decode(world, ids).strip()
                reward = f"{world.task.reward(example.prompt, text):6.2f}" if world.task else ""
                shown = " ".join(text.split())
                # A terminal obeys control characters, and a model that has learnt little says some.
                shown = "".join(x if x.isprintable() else "\ufffd" for x in shown)
                lines.append(f"  {who:9} {reward}  {shown}")
    return "\n".join(lines)


SUMMARY = """
    policy_reward reference_reward best_of_8_reward optimal_reward win_rate kl efficiency
    policy_distinct
""".split()
SPLITS = {"held out": "", "new subjects": "ood_", "trained on": "train_"}


def summary(metrics: dict) -> str:
    """The numbers that matter, as a table: of a task a column a split, of a file a row a score."""
    notes = []
    if "policy_reward" in metrics:
        columns = {name: prefix for name, prefix in SPLITS.items() if f"{prefix}kl" in metrics}
        rows = {name: [metrics[prefix + name] for prefix in columns.values()] for name in SUMMARY}
        notes = [beyond_the_frontier(name, metrics, prefix) for name, prefix in columns.items()]
    else:
        columns, prefix = ["top1_reward", "pair_accuracy"], "top1_reward_"
        scores = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
        rows = {s: [metrics[prefix + s], metrics.get(f"pair_accuracy_{s}")] for s in scores}
        if "longest" in rows:
            rows["longest"][1] = metrics["longer_accuracy"]
        known = [name for name in ("mean_reward", "best_reward", "kl") if name in metrics]
        notes = ["  ".join(f"{name} {metrics[name]:.3f}" for name in known)]
    lines = [" " * 18 + "".join(f"{column:>15}" for column in columns)] if rows else []
    for name, values in rows.items():
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"{name:18}" + "".join(f"{value:>15}" for value in shown))
    return "\n".join([*lines, *filter(None, notes)])


def beyond_the_frontier(split: str, metrics: dict, prefix: str = "") -> str:
    """What is to be said of an efficiency where no optimum needs as much KL; empty elsewhere."""
    if metrics[f"{prefix}optimal_tau"] != 0 or metrics[f"{prefix}efficiency"] is None:
        return ""
    return (
        f"{split}: over the answers drawn no optimum needs more than "
        f"{metrics[f'{prefix}optimal_kl']:.2f} nats; the efficiency is against the best at that KL"
    )
