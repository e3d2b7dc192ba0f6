"""Align a small language model offline, and measure it against the exact optimum.

    python train.py --objective lire                              the main job, 90 s on two cores
    python train.py --objective dro --model t5 --task summary     another objective, model and task
    python train.py --objective lire --data lists.jsonl           your own preference lists

This file is what happens in a run, from top to bottom: what a State is, how the pool of a round is
made, THE LOOP, and main(config) -> metrics. The machinery around it is in harness/.
"""

import bisect
import dataclasses
import json
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from data import DataError, make_batch, save_ranks
from harness.config import (
    Config,
    ConfigError,
    command_line,
    compares_lists,
    resolve,
    settings_read,
    with_settings_of_the_data,
)
from harness.evaluation import evaluate, quick_evaluation, side_by_side
from harness.figures import draw
from harness.pool import (
    Pool,
    World,
    make_world,
    normalise,
    precision,
    reward_list,
    rng,
    sample_lists,
    score_lists,
)
from harness.reference import cache_key, digest_of, get_reference, new_model
from harness.run import (
    Progress,
    Run,
    check_folder,
    interruptible,
    load_checkpoint,
    print_table,
    restore,
    save,
    set_numerics,
)
from harness.update import objective_inputs, step_metrics, update
from model import ValueNetwork, response_logps
from objectives import OBJECTIVES, total, try_objective

# ------------------------------------------------------------------------------------------- state


@dataclass
class State:
    """What the loop changes, and a checkpoint holds."""

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    value: nn.Module | None = None  # DRO's value network
    reference: str = ""  # digest of the reference's weights, which never change
    step: int = 0  # optimiser steps done
    round_index: int = -1  # the round that `generated` belongs to
    generated: list | None = None  # responses sampled in it, [[ids, ...], ...] for every prompt
    reward_scale: list | None = None  # mean and deviation of the first pool's rewards


def new_state(c: Config, world: World, reference: nn.Module) -> State:
    """Policy and, where needed, value network as the reference left them; a parameter group for each."""

    def copy():
        model = new_model(c, world)
        model.load_state_dict(reference.state_dict())
        return model

    policy, value = copy(), None
    groups = [{"params": list(policy.parameters()), "peak": c.lr}]
    if "values" in OBJECTIVES[c.objective].needs:
        value = ValueNetwork(policy if c.share_networks else copy()).to(c.device)
        if c.share_networks:
            groups[0]["params"] += value.value_head.parameters()
        else:
            value_lr = c.lr if c.value_lr is None else c.value_lr
            groups.append({"params": list(value.parameters()), "peak": value_lr})
    optimizer = torch.optim.AdamW(groups, lr=c.lr, weight_decay=0.0)
    return State(policy, optimizer, value, digest_of(reference.state_dict()))


# ----------------------------------------------------------------------------- the pool of a round


def round_starts(c: Config) -> list[int]:
    """Steps done when each round begins, and at the end of the last: round k is steps [k] + 1 to [k + 1]."""
    rounds = max(c.evolve, 1)
    return [round(k * c.steps / rounds) for k in range(rounds + 1)]


def make_pool(
    c: Config, world: World, state: State, reference: nn.Module, round_index: int
) -> Pool:
    """The lists that a round trains on: sampled (Algorithm 1 of LIRE) or the data's own, rewarded, scored.

    Sets the state's round, its samples and, in the first pool, the scale of the rewards.
    """
    began = time.time()
    # Responses: samples of the policy as it is now, in place of the last round's. A run that was
    # resumed inside a round has its samples already.
    if c.evolve:
        if state.round_index != round_index:
            state.generated = sample_round(c, world, state.policy, round_index)
        examples, lists = world.train, state.generated
    else:
        examples, lists = world.logged, [e.response_ids[: c.candidates] for e in world.logged]
    state.round_index = round_index
    chosen = [(e, responses) for e, responses in zip(examples, lists) if responses]
    if compares_lists(c):
        whole = [(e, responses) for e, responses in chosen if len(responses) > 1]
        if len(whole) < len(chosen):
            print(
                f"{len(chosen) - len(whole)} lists of a single response are left out: there is "
                "nothing to compare in them"
            )
        chosen = whole

    # Rewards: the task's, or the file's; on the scale of the first pool where that is asked for.
    if world.task:
        rewards = [reward_list(world, e.prompt, responses) for e, responses in chosen]
    else:
        rewards = [e.rewards[: len(responses)] for e, responses in chosen]
    flat = [reward for row in rewards for reward in row]
    if not state.step and not compares_lists(c):
        with_settings_of_the_data(c, flat)  # a later pool may be of one reward, the first may not
    if c.reward_norm == "global":
        state.reward_scale = state.reward_scale or mean_and_deviation(flat)
        rewards = [[normalise(reward, state.reward_scale) for reward in row] for row in rewards]

    # Reference log-probs, of each list under its prompt (--shuffle-prompts: under another's).
    prompts = [e for e, _ in chosen]
    if c.shuffle_prompts:
        generator = rng(c.seed, "shuffle", round_index)
        prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
    unscored = [
        dataclasses.replace(e, prompt_ids=prompt.prompt_ids, response_ids=responses, rewards=row)
        for (e, responses), prompt, row in zip(chosen, prompts, rewards)
    ]
    ref_logps = score_lists(c, world, reference, unscored)
    pool = [dataclasses.replace(e, ref_logps=row) for e, row in zip(unscored, ref_logps)]

    flat = [reward for row in rewards for reward in row]
    best = sum(map(max, rewards)) / len(rewards)
    print(
        f"pool: {len(pool)} lists of {len(flat) / len(pool):.1f} responses, reward "
        f"{sum(flat) / len(flat):.3f}, best of a list {best:.3f} ({time.time() - began:.0f} s)"
    )
    return Pool(pool, round_index, c.batch_size, c.seed)


def sample_round(c: Config, world: World, policy: nn.Module, round_index: int) -> list:
    """M responses to each training prompt that the round will visit, none to the others."""
    starts, generator = round_starts(c), rng(c.seed, "prompts", round_index)
    steps = starts[round_index + 1] - starts[round_index]
    visits = -(-steps * c.batch_size // c.iterate)  # prompts that one pass reads
    order = torch.randperm(len(world.train), generator=generator).tolist()
    chosen = sorted(order[:visits])
    examples = [world.train[i] for i in chosen]
    generator = rng(c.seed, "pool", round_index, device=c.device)
    temperature = c.sample_temperature
    samples = sample_lists(c, world, policy, examples, c.candidates, generator, temperature)
    lists = [[]] * len(world.train)
    for i, responses in zip(chosen, samples):
        lists[i] = responses
    return lists


def mean_and_deviation(rewards: list[float]) -> list[float]:
    """Mean and standard deviation of the first pool's rewards. Raises: ConfigError where they are constant."""
    if max(rewards) == min(rewards):
        raise ConfigError(f"every reward is {rewards[0]}: there is nothing to learn")
    mean = sum(rewards) / len(rewards)
    return [mean, (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5]


# ---------------------------------------------------------------------------------------- the loop

RESUME = "`python train.py --resume {}` goes on"
KEPT = "the last good checkpoint is kept in {}; a smaller --lr may help"


def train_policy(c: Config, world: World, state: State, reference: nn.Module, run: Run) -> None:
    """The loop: from state.step to c.steps. On Ctrl-C (run.stop) it ends after the step it is in."""
    objective, starts, pool, heldout = OBJECTIVES[c.objective], round_starts(c), None, {}
    progress = Progress(c.objective, c.steps, state.step)
    for step in range(state.step + 1, c.steps + 1):
        # A round begins (Algorithm 1 of LIRE): sample M candidates a prompt from the policy as it is
        # now, reward them, score them under the reference. --evolve 0: the data's own lists.
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
            logps = response_logps(state.policy, batch, world.allowed)  # [B, M]
            x = objective_inputs(c, world, state, reference, batch, logps)

        # The objective is a function of x; the means of its parts are added up.
        losses = objective.loss(c, x)
        loss = total(losses)

        # Backward, clip, one step of the optimiser; it refuses a gradient that is not finite.
        grad_norms = update(state.optimizer, loss, step, c.steps, c.clip, KEPT.format(c.out))
        state.step = step

        # Now and then: look at held-out prompts, write a row, save a checkpoint.
        due = step % c.eval_every == 0 or step == c.steps
        if due:
            heldout = quick_evaluation(c, world, state, reference, step)
        if due or step == 1 or step % 10 == 0:
            row = step_metrics(c, state, x, losses, grad_norms)
            run.log(row | (heldout if due else {}))
        progress.show(step, loss, heldout, line=due)
        if due or run.stop:
            run.save(state)
        if run.stop:
            raise KeyboardInterrupt(f"saved after step {step}; {RESUME.format(c.out)}")
    run.lap("train")


# -------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """One whole run. Returns the metrics, which are also in out/<run>/metrics.json.

    Raises: ConfigError, DataError with one line for the user, before anything is written, but for a
    task whose first pool has nothing to learn; FloatingPointError where training left the finite
    numbers (the last good checkpoint is kept).
    """
    began = time.time()
    c = resolve(config)
    try_objective(c)
    out = check_folder(c)
    set_numerics(c)

    # What it learns on: a task or files, tokenised. Files may decide a setting, or teach nothing.
    world = make_world(c)
    if c.data:
        rewards = [reward for e in world.logged for reward in e.rewards[: c.candidates]]
        c = with_settings_of_the_data(c, rewards)
    key = cache_key(c, world)
    checkpoint = load_checkpoint(c, key)
    print_table(settings_read(c))
    out.mkdir(parents=True, exist_ok=True)
    save(json.dumps(vars(c), indent=1), out / "config.json")
    if world.ranks:
        save_ranks(world.ranks, out / "tokenizer.txt")
    run = Run(c, key, began)
    run.lap("setup")

    # Where it starts from: the reference, which never changes.
    reference = get_reference(c, world, key, checkpoint)
    save(reference.state_dict(), out / "reference.pt")
    state = new_state(c, world, reference)
    if checkpoint:
        restore(state, checkpoint)
    run.lap("reference")

    # The loop; without one the policy is the reference.
    if OBJECTIVES[c.objective].loss and c.steps:
        run.start_log(state.step)
        with interruptible() as run.stop:
            train_policy(c, world, state, reference, run)
    else:
        run.save(state)

    # What has been learnt.
    metrics, answers = evaluate(c, world, state, reference)
    run.lap("evaluate")
    metrics |= run.costs()
    save(json.dumps(metrics, indent=1), out / "metrics.json")
    save(side_by_side(world, answers, 10, 4) + "\n", out / "samples.txt")
    print(f"\n{side_by_side(world, answers)}\n")
    print_table(metrics)
    print(draw(out))
    print(f"written to {out}/")
    return metrics


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # whatever a model says, the terminal shows something
    try:
        main(command_line(description=__doc__))
    except (ConfigError, DataError, FloatingPointError, OSError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt as e:
        way_on = RESUME.format("RUN") + " from the last checkpoint of its folder, if it has one"
        sys.exit(f"\ninterrupted: {e or way_on}")
