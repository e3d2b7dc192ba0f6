"""Does DRO-V reach the exact optimum, with real networks? On tiny, where all 584 responses of a prompt can be enumerated:

    python -m experiments.exact            GPT and T5, tau 0.5, 1 and 5: a minute each on a core
    python -m experiments.exact --quick    the GPT at tau 1 alone

A small reference, then DRO-V on batches of 128 responses that no policy chose: a length of 1 to 3 words, then the words, all
equally likely. At the end KL(pi*, pi) and |V - V*|, mean over the prompts, in nats and in units of the normalised reward. One prompt
is what converges in a minute; the rows with four show how much longer several take. The rows "1/2" train with the coefficient
that the box of Algorithm 1 prints in place of tau/2: see dro.dro_v_losses. Writes results/exact.json.
"""

import argparse
import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import torch

import data
import dro
import model as models
import train
from train import Config

BATCH, STEPS, LR = 128, {"gpt": 2000, "t5": 3000}, {"gpt": 4e-3, "t5": 2e-3}
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
CASES += [
    ("gpt", 4, 0.5, "tau/2"),
    ("t5", 4, 0.5, "tau/2"),
    ("gpt", 1, 0.5, "1/2"),
    ("gpt", 1, 5.0, "1/2"),
]


def with_the_printed_coefficient(logps, ref_logps, rewards, values, tau):
    """DRO-V as the box of Algorithm 1 prints it: 1/2 in the policy's loss, whatever tau is."""
    policy, value = dro.dro_v_losses(logps, ref_logps, rewards, values, tau)
    return policy + (0.5 - tau / 2) * (logps - ref_logps).square(), value


def full_support(generator, B: int) -> torch.Tensor:
    """Indices [B, BATCH / B] into train.enumerate_tiny: a length of 1, 2 or 3 words, then its 8, 64 or 512 responses, uniformly."""
    length = torch.randint(3, (B, BATCH // B), generator=generator)
    number, first = torch.tensor([8, 64, 512])[length], torch.tensor([0, 8, 72])[length]
    return first + (torch.rand(length.shape, generator=generator) * number).long()


def run(model: str, prompts: int, tau: float, coefficient: str, seed: int = 0) -> dict:
    """Train one case on one thread. Returns: {"kl": KL(pi*, pi), "kl_before": KL(pi*, reference), "value_error", "seconds"}."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    steps = STEPS[model]
    began, losses = (
        time.time(),
        dro.dro_v_losses if coefficient == "tau/2" else with_the_printed_coefficient,
    )
    c = train.resolve(Config(model=model, tau=tau, seed=seed, lr=LR[model], **SETTINGS))
    world = train.make_world(c)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = train.train_reference(c, world).eval()
    state = train.new_state(c, world, reference)

    responses = train.enumerate_tiny(world)
    examples = train.with_responses(
        world.train[:: len(world.train) // prompts][:prompts], [responses] * prompts
    )
    for e in examples:
        e.rewards = train.rewarded(world, e.prompt, responses)
    whole = data.make_batch(examples, world.enc.eot_token)
    rewards = (whole.rewards - whole.rewards.mean()) / whole.rewards.std(
        correction=0
    )  # [prompts, 584]

    def score(model):
        return torch.tensor(train.score_examples(c, world, model, examples))

    ref_logps, generator, rows = (
        score(reference),
        train.rng(seed, "exact"),
        torch.arange(prompts)[:, None],
    )
    mask = torch.ones(prompts, BATCH // prompts, dtype=torch.bool)
    for step in range(steps):
        pick = rows, full_support(generator, prompts)
        batch = data.Batch(
            whole.prompt_ids,
            whole.prompt_mask,
            whole.response_ids[pick],
            whole.response_mask[pick],
            mask,
            rewards[pick],
        )
        logps = models.response_logps(state.policy, batch, world.allowed)
        values = train.batch_values(c, state, batch)[:, None].expand_as(logps)
        policy_loss, value_loss = losses(
            *(x.flatten() for x in (logps, ref_logps[pick], rewards[pick], values)), tau
        )
        norms = train.optimizer_step(
            state.optimizer, policy_loss.mean() + value_loss.mean(), step, steps, c.clip
        )
        if not all(n < 1e6 for n in norms):
            break  # diverged, or not a number

    exact = ref_logps.double(), rewards.double(), tau
    optimum = dro.optimal_logps(*exact)
    with torch.no_grad():
        learned = state.value(whole.prompt_ids, whole.prompt_mask).double()
    return {
        "kl": dro.kl_divergence(optimum, score(state.policy).double()).mean().item(),
        "kl_before": dro.kl_divergence(optimum, ref_logps.double()).mean().item(),
        "value_error": (learned - dro.optimal_value(*exact)).abs().mean().item(),
        "seconds": time.time() - began,
    }


def table(results: list) -> str:
    """The table in Markdown."""
    lines = [
        "| model | prompts | tau | coefficient | KL(pi*, reference) | KL(pi*, pi) | mean abs(V - V*) | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, prompts, tau, coefficient, m in results:
        lines.append(
            f"| {model} | {prompts} | {tau:g} | {coefficient} | {m['kl_before']:.3f} | {m['kl']:.1e} | {m['value_error']:.4f} | {m['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(quick: bool = False, jobs: int = 0) -> None:
    cases = [("gpt", 1, 1.0, "tau/2")] if quick else CASES
    with concurrent.futures.ProcessPoolExecutor(
        jobs or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        found = [pool.submit(run, *case) for case in cases]
        results = []
        for case, future in zip(cases, found):
            results.append([*case, future.result()])
            print(f"{len(results)}/{len(cases)} done", flush=True)
    if not quick:
        Path("results").mkdir(exist_ok=True)
        Path("results/exact.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=0, help="cases at a time (default: one a core)")
    args = parser.parse_args()
    main(args.quick, args.jobs)
