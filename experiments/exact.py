"""Does DRO-V with real networks reach the exact optimum on tiny, all 584 responses enumerated?

    python -m experiments.exact            GPT and T5, tau 0.5, 1 and 5: 4 minutes on two cores
    python -m experiments.exact --quick    the GPT at tau 0.5, both coefficients: 20 seconds

A small reference, then DRO-V on batches of 128 responses that no policy chose: a length of 1 to 3
words, then the words, all equally likely. At the end KL(pi*, pi) and |V - V*|, mean over the
prompts, in nats and in units of the normalised reward. Four prompts take the GPT four times the
steps of one. The rows "1/2" train with the coefficient that the box of Algorithm 1 prints in place
of tau/2: see dro.dro_v_losses. At tau 1 the two agree. Writes results/exact.json.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import os
import time

import torch
from torch import Tensor

import dro
from data import Batch, make_batch
from experiments.cells import write_results
from harness.config import resolve
from harness.evaluation import enumerate_responses
from harness.pool import make_world, reward_list, rng, score_lists, set_numerics
from harness.reference import train_reference
from harness.run import run_script
from harness.update import prompt_values, update
from model import response_logps
from train import Config, new_state

BATCH, LR = 128, {"gpt": 4e-3, "t5": 2e-3}
STEPS = {("gpt", 1): 2000, ("gpt", 4): 8000, ("t5", 1): 3000, ("t5", 4): 3000}
QUICK = [("gpt", 1, 0.5, "tau/2", 1000), ("gpt", 1, 0.5, "1/2", 1000)]
SETTINGS = {
    "task": "tiny",
    "objective": "dro",
    "width": 64,
    "reference_steps": 50,
    "value_lr": 2e-3,
    "clip": 10.0,
    "device": "cpu",
}
CASES = [(model, 1, tau, "tau/2") for model in ("gpt", "t5") for tau in (0.5, 1.0, 5.0)]
CASES += [("gpt", 4, 0.5, "tau/2"), ("t5", 4, 0.5, "tau/2")]
CASES += [("gpt", 1, 0.5, "1/2"), ("gpt", 1, 5.0, "1/2")]


def losses_as_printed(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, values: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """DRO-V as the box of Algorithm 1 prints it: 1/2 in the policy's loss, whatever tau is."""
    policy, value = dro.dro_v_losses(logps, ref_logps, rewards, values, tau)
    return policy + (0.5 - tau / 2) * (logps - ref_logps).square(), value


def full_support(generator: torch.Generator, B: int) -> Tensor:
    """Indices [B, BATCH / B] of responses: first 1, 2 or 3 words, then one of 8, 64 or 512."""
    length = torch.randint(3, (B, BATCH // B), generator=generator)
    number, first = torch.tensor([8, 64, 512])[length], torch.tensor([0, 8, 72])[length]
    return first + (torch.rand(length.shape, generator=generator) * number).long()


def run_case(
    model: str, prompts: int, tau: float, coefficient: str, steps: int = 0, seed: int = 0
) -> dict:
    """Train one case on one thread; steps: 0 takes those of STEPS.

    Returns: {"kl": KL(pi*, pi), "kl_before": KL(pi*, reference), "value_error", "seconds"}.
    """
    torch.set_num_threads(1)
    began, steps = time.time(), steps or STEPS[model, prompts]
    losses = dro.dro_v_losses if coefficient == "tau/2" else losses_as_printed
    c = resolve(Config(model=model, tau=tau, seed=seed, lr=LR[model], **SETTINGS))
    set_numerics(c)
    world = make_world(c)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = train_reference(c, world).eval()
    state = new_state(c, world, reference)

    # Every response to every prompt, with its reward, z-scored over them all.
    responses = enumerate_responses(world)
    examples = [
        dataclasses.replace(
            e, response_ids=responses, rewards=reward_list(world, e.prompt, responses)
        )
        for e in world.train[:: len(world.train) // prompts][:prompts]
    ]
    whole = make_batch(examples, world.enc.eot_token)
    rewards = (whole.rewards - whole.rewards.mean()) / whole.rewards.std(correction=0)

    def score(model):
        return torch.tensor(score_lists(c, world, model, examples))  # [prompts, 584]

    ref_logps, generator = score(reference), rng(seed, "exact")
    rows = torch.arange(prompts)[:, None]
    mask = torch.ones(prompts, BATCH // prompts, dtype=torch.bool)
    prompt_ids, prompt_mask = whole.prompt_ids, whole.prompt_mask
    for step in range(1, steps + 1):
        pick = rows, full_support(generator, prompts)
        ids, response_mask = whole.response_ids[pick], whole.response_mask[pick]
        batch = Batch(prompt_ids, prompt_mask, ids, response_mask, mask, rewards[pick])
        logps = response_logps(state.policy, batch, world.allowed)
        values = prompt_values(c, state.value_network, batch)[:, None].expand_as(logps)
        flat = (x.flatten() for x in (logps, ref_logps[pick], rewards[pick], values))
        policy_loss, value_loss = losses(*flat, tau)
        loss = policy_loss.mean() + value_loss.mean()
        try:
            norms = update(state.optimizer, loss, step, steps, c.clip)
        except FloatingPointError:
            break
        if max(norms) > 1e6:
            break  # diverged

    exact = ref_logps.double(), rewards.double(), tau
    optimum = dro.optimal_logps(*exact)
    with torch.no_grad():
        learned = state.value_network(prompt_ids, prompt_mask).double()
    return {
        "kl": dro.kl_divergence(optimum, score(state.policy).double()).mean().item(),
        "kl_before": dro.kl_divergence(optimum, ref_logps.double()).mean().item(),
        "value_error": (learned - dro.optimal_value(*exact)).abs().mean().item(),
        "seconds": time.time() - began,
    }


def table(results: list) -> str:
    """The table in Markdown."""
    lines = [
        "| model | prompts | tau | coefficient | KL(pi*, reference) | KL(pi*, pi) "
        "| mean abs(V - V*) | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, prompts, tau, coefficient, *_, m in results:
        lines.append(
            f"| {model} | {prompts} | {tau:g} | {coefficient} | {m['kl_before']:.3f} "
            f"| {m['kl']:.1e} | {m['value_error']:.4f} | {m['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(quick: bool = False, jobs: int = 0) -> None:
    """Run the cases, print the table and, where they are all, write it."""
    cases = QUICK if quick else CASES
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), context) as pool:
        futures = [pool.submit(run_case, *case) for case in cases]
        results = []
        for case, future in zip(cases, futures):
            results.append([*case, future.result()])
            print(f"{len(results)}/{len(cases)} done", flush=True)
    if not quick:
        write_results("exact", "python -m experiments.exact", results)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two cases alone")
    parser.add_argument("--jobs", type=int, default=0, help="cases at a time (0: one a core)")
    run_script("exact", lambda: main(**vars(parser.parse_args())))
