"""Align a small language model with rewards, and measure it against the optimum.

    python train.py --objective lire                              the main job, a minute or so
    python train.py --objective dro --model t5 --task summary     another objective, model and task
    python train.py --objective lire --data lists.jsonl           your own preference lists

This file is what happens in a run, from top to bottom: what a State is, how the pool of a round is
made, THE LOOP, and main(config) -> metrics. The machinery around it is in harness/.
"""

import bisect
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

# Beside other work, torch's threads that wait for each other should sleep soon and not spin.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import nn

from data import make_batch
from harness.command_line import command_line
from harness.config import (
    Config,
    ConfigError,
    describe_settings,
    resolve,
    why_lists,
    with_settings_of_the_data,
)
from harness.evaluation import evaluate, quick_evaluation, side_by_side, summary
from harness.figures import draw
from harness.pool import (
    Pool,
    World,
    best_and_worst,
    comparable,
    describe_pool,
    make_world,
    mean_and_deviation,
    normalise,
    own_lists,
    pool_metrics,
    precision,
    reward_list,
    rng,
    round_starts,
    sample_lists,
    score_lists,
    set_numerics,
    under_other_prompts,
    with_responses,
)
from harness.reference import cache_key, digest_of, get_reference, new_model
from harness.run import (
    Progress,
    Run,
    check_folder,
    describe_model,
    interruptible,
    load_checkpoint,
    locked,
    restore,
    run_script,
    save,
)
from harness.update import objective_inputs, policy_logps, step_metrics, update, with_reference
from model import ValueNetwork
from objectives import OBJECTIVES, total, try_objective

# -------------------------------------------------------------------------------------------- state


@dataclass
class State:
    """What the loop changes, and a checkpoint holds."""

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    value_network: ValueNetwork | None = None  # DRO's
    reference: str = ""  # digest of the reference's weights, which never change
    step: int = 0  # optimiser steps done
    round_index: int = -1  # the round that `generated` belongs to
    generated: list | None = None  # responses sampled in it, [[ids, ...], ...] of its prompts
    reward_scale: list | None = None  # mean and deviation of the first pool's rewards
    pool_metrics: dict | None = None  # how many of the last pool's candidates and rewards differ


def new_state(c: Config, world: World, reference: nn.Module) -> State:
    """Policy and, if needed, value network as the reference left them; a parameter group each."""

    def copy():
        model = new_model(c, world)
        model.load_state_dict(reference.state_dict())
        return model

    policy, value_network = copy(), None
    groups = [{"params": list(policy.parameters()), "peak": c.lr}]
    if "values" in OBJECTIVES[c.objective].needs:
        value_network = ValueNetwork(policy if c.share_networks else copy()).to(c.device)
        if c.share_networks:
            groups[0]["params"] += value_network.value_head.parameters()
        else:
            value_lr = c.lr if c.value_lr is None else c.value_lr
            groups.append({"params": list(value_network.parameters()), "peak": value_lr})
    optimizer = torch.optim.AdamW(groups, lr=c.lr, weight_decay=0.0, fused=True)
    return State(policy, optimizer, value_network, digest_of(reference.state_dict()))


# ------------------------------------------------------------------------------ the pool of a round


def make_pool(
    c: Config, world: World, state: State, reference: nn.Module, round_index: int
) -> Pool:
    """The lists that a round trains on, with their rewards and reference log-probs.

    Sets the state's round, its samples and, with the first pool, the scale of the rewards.
    """
    needs = OBJECTIVES[c.objective].needs
    # Responses: M samples a prompt from the policy as it is now, in place of the last round's
    # (a run that was resumed inside a round has them already); with --evolve 0 the data's own.
    prompts = world.rounds[round_index]
    if c.evolve and state.round_index != round_index:
        generator = rng(c.seed, "pool", round_index, device=c.device)
        M, temperature = c.candidates, c.sample_temperature
        state.generated = sample_lists(c, world, state.policy, prompts, M, generator, temperature)
    state.round_index = round_index
    lists = with_responses(prompts, state.generated) if c.evolve else own_lists(c, world)
    lists = comparable(c, lists)

    # Rewards: the task's or the file's, on the scale of the first pool where that is asked for.
    if world.task:
        lists = [replace(e, rewards=reward_list(world, e.prompt, e.response_ids)) for e in lists]
    rewards = [reward for e in lists for reward in e.rewards]
    if not state.step and not why_lists(c):
        with_settings_of_the_data(c, rewards)  # to refuse a first pool that teaches nothing
    if c.reward_norm == "global":
        state.reward_scale = state.reward_scale or mean_and_deviation(rewards)
        lists = [replace(e, rewards=normalise(e.rewards, state.reward_scale)) for e in lists]

    state.pool_metrics = pool_metrics(lists)
    print(describe_pool(c, world, round_index, lists, state.pool_metrics))
    if "pairs" in needs:
        lists = [best_and_worst(e) for e in lists]

    # Log-probs under the reference, of each list under its prompt, or in a control under another.
    if c.shuffle_prompts:
        lists = under_other_prompts(lists, rng(c.seed, "shuffle", round_index))
    if "reference" in needs:
        ref_logps = score_lists(c, world, reference, lists)
        lists = [replace(e, ref_logps=logps) for e, logps in zip(lists, ref_logps)]
    return Pool(lists, round_index, c.batch_size, c.seed)


# ----------------------------------------------------------------------------------------- the loop


def train_policy(c: Config, world: World, state: State, reference: nn.Module, run: Run) -> None:
    """The loop from state.step to c.steps; on Ctrl-C (run.stop) it ends after the step it is in."""
    objective, starts = OBJECTIVES[c.objective], round_starts(c)
    pool, latest = None, {}  # of this round; of the last look at held-out prompts
    progress = Progress(c.objective, c.steps, state.step)
    for step in range(state.step + 1, c.steps + 1):
        # A round begins (Algorithm 1 of LIRE): sample M candidates a prompt from the policy as it
        # is now, reward them, score them under the reference. --evolve 0: the data's own lists.
        round_index = bisect.bisect_left(starts, step) - 1
        if pool is None or pool.round_index != round_index:
            run.lap("train")
            pool = make_pool(c, world, state, reference, round_index)
            run.lap("pool")

        # A batch: B lists of the pool, padded to tensors.
        examples = pool.batch(step - 1 - starts[round_index])
        batch = make_batch(examples, world.enc.eot_token, c.device)

        # Forward: log pi(y|x) of every candidate, with gradient; what else the objective needs.
        with precision(c):
            logps = policy_logps(c, world, state.policy, batch)  # [B, M]
            x = objective_inputs(c, world, state, reference, batch, logps)

        # The objective is a function of x; the means of its parts are added up.
        losses = objective.loss(c, x)
        loss = total(losses)

        # Backward, clip, one step of the optimiser; it refuses a gradient that is not finite.
        grad_norms = update(state.optimizer, loss, step, c.steps, c.clip)
        state.step = step

        # Now and then: look at held-out prompts, write a row, save a checkpoint.
        due = step % c.eval_every == 0 or step == c.steps
        if due:
            latest = quick_evaluation(c, world, state, reference, step)
        if due or step == 1 or step % 10 == 0:
            x = with_reference(c, world, reference, batch, x)
            row = step_metrics(c, state, x, losses, grad_norms)
            run.log(row | (latest if due else {}))
        progress.show(step, loss, latest, line=due)
        if due or run.stop:
            run.save(state)
        if run.stop:
            raise KeyboardInterrupt(f"saved after step {step}; {run.way_on}")
    run.lap("train")


# --------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """One whole run. Returns the metrics, which are also in out/<run>/metrics.json.

    Raises: ConfigError, DataError with one line for the user, before anything is written, but for
    a task whose first pool has nothing to learn; FloatingPointError where training left the finite
    numbers (the last good checkpoint is kept).
    """
    began = time.time()
    c = resolve(config)
    try:
        try_objective(c)
    except ValueError as e:
        raise ConfigError(f"--objective {c.objective} fails on made-up numbers: {e}") from e
    check_folder(c)
    set_numerics(c)
    # What it learns on: a task or files, tokenised. Files may decide a setting, or teach nothing.
    world = make_world(c)
    if c.data and not c.reward:
        rewards = [reward for e in own_lists(c, world) for reward in e.rewards]
        c = with_settings_of_the_data(c, rewards)
        if advice := OBJECTIVES[c.objective].advice(c, rewards):
            print(advice)
    with locked(Path(c.out)):
        check_folder(c)
        return align(c, world, began)


def align(c: Config, world: World, began: float) -> dict:
    """The run in its folder, which is ours alone; as `main`."""
    out, key = Path(c.out), cache_key(c, world)
    run_key = key | {"rounds": world.rounds_fingerprint[:16]}
    checkpoint = load_checkpoint(c, run_key)
    print(describe_settings(c))
    save(json.dumps(vars(c), indent=1), out / "config.json")
    run = Run(c, run_key, began)
    run.lap("setup")

    # Where it starts from: the reference, which never changes.
    reference = get_reference(c, world, key, checkpoint)
    save(reference.state_dict(), out / "reference.pt")
    describe_model(reference, world, out)
    state = new_state(c, world, reference)
    if checkpoint:
        restore(state, checkpoint)
    run.lap("reference")

    # The loop; without one the policy is the reference.
    if OBJECTIVES[c.objective].loss and c.steps:
        run.start_log(state.step)
        with interruptible() as run.stop:
            try:
                train_policy(c, world, state, reference, run)
            except FloatingPointError as e:
                raise FloatingPointError(f"{e}; {run.kept()}") from None
    else:
        run.save(state)

    # What has been learnt.
    metrics, answers = evaluate(c, world, state, reference)
    run.lap("evaluate")
    metrics |= {name.replace("/", "_"): v for name, v in (state.pool_metrics or {}).items()}
    metrics |= run.costs()
    save(json.dumps(metrics, indent=1), out / "metrics.json")
    save(side_by_side(world, answers, 10, 4) + "\n", out / "samples.txt")
    print(f"\n{side_by_side(world, answers)}\n\n{summary(metrics)}\n\n{draw(out)}")
    print(f"everything else: {out}/ (metrics.json, log.jsonl, samples.txt)")
    return metrics


if __name__ == "__main__":
    run_script("train.py", lambda: main(command_line(description=__doc__)))
