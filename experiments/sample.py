"""Answers of a run's policy and reference, side by side:

python -m experiments.sample out/lire-dialogue-0 --prompt "How was the Ashford soup?" -n 5
"""

import argparse
from pathlib import Path

import torch

import data
from data import Example, Task
from harness.command_line import command_line
from harness.config import ConfigError
from harness.evaluation import side_by_side
from harness.pool import World, rng, sample_lists
from harness.pretrained import read_folder
from harness.reference import get_reference, new_model
from harness.run import read_checkpoint, reason_of, run_script


def answers(run: str, prompt: str, count: int, seed: int = 0, temperature: float = 1.0) -> str:
    """Answers to a prompt, `count` of each model, with rewards where the task can score them.

    Raises: ConfigError where `run` is not the folder of a run or is damaged, or the prompt is too
        long; DataError where it has no token.
    """
    folder = Path(run)
    if not (folder / "checkpoint.pt").exists():
        raise ConfigError(
            f"{run}: no checkpoint.pt in it, expected the folder of a run, such as "
            "out/lire-dialogue-0"
        )
    c = command_line([f"--resume={run}"])
    c.device = c.device if c.device == "cpu" or torch.cuda.is_available() else "cpu"
    checkpoint = read_checkpoint(folder / "checkpoint.pt", c.device)
    found = read_folder(folder)
    enc = found.encoding()
    task = None if c.data else data.make_task(c.task, c.seed)
    longest = min(c.max_response, task.max_response) if task else c.max_response
    allowed = data.allowed_tokens(task, enc, longest, found.config.vocab_size)
    world = World(
        enc=enc,
        init=found,
        task=task if task and can_score(task, prompt) else None,
        allowed=None if allowed is None else allowed.to(c.device),
        max_response=longest,
    )
    ids = data.encode_prompt(enc, prompt)
    if len(ids) > c.max_prompt:
        raise ConfigError(f"--prompt has {len(ids)} tokens, expected at most {c.max_prompt}")
    policy, reference = new_model(c, world).eval(), get_reference(c, world, {}, checkpoint)
    try:
        policy.load_state_dict(checkpoint["policy"])
    except RuntimeError as e:
        raise ConfigError(f"checkpoint.pt and config.json differ ({reason_of(e)})") from None
    example, lists = Example(prompt, ids, [], []), {}
    for who, model in (("policy", policy), ("reference", reference)):
        generator = rng(seed, "sample", device=c.device)
        lists[who] = sample_lists(c, world, model, [example], count, generator, temperature)[0]
    note = "" if world.task or not task else f"({c.task} has no reward for this prompt)\n"
    return note + side_by_side(world, [(example, lists["policy"], lists["reference"])], 1, count)


def can_score(task: Task, prompt: str) -> bool:
    """Is this a prompt of the task?"""
    try:
        task.reward(prompt, "")
    except (AttributeError, KeyError, TypeError):
        return False
    return True


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run of train.py")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("-n", type=int, default=5, help="answers of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    if args.n < 1 or not args.temperature > 0:
        raise ConfigError(f"-n {args.n} --temperature {args.temperature}: both must be positive")
    print(answers(args.run, args.prompt, args.n, args.seed, args.temperature))


if __name__ == "__main__":
    run_script("sample", main)
