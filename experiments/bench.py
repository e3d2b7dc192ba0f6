"""What does reading the prompt once save? Time and memory of an update, and of cached sampling.

    python -m experiments.bench --quick                     one shape, the default model, 3 pairs:
                                                            well under a minute on two cores
    python -m experiments.bench                             default and 5 M model, four shapes,
                                                            15 pairs
    python -m experiments.bench --model gpt2 --device cuda  the 124 M GPT-2 size
    python -m experiments.bench --peer hf                   against transformers; trl: against TRL
    python -m experiments.bench --quick --model v8k v32k v50k --shapes 8,64,128
                                                            what a large vocabulary costs
    python -m experiments.bench --mfu                       the share of a GPU's peak that LIRE
                                                            reaches at the 124 M size

`once` is an update (forward and backward, no optimiser) as the project does it: the prompt read
once, its M responses attend to it. `repeated` is the same model given B * M prompts with one
response each; the head sees response positions alone in both. They run in turn (pairs: once,
repeated, repeated, once, ...); shown are the median and, in brackets, the quartiles, of each time
and of the ratio pair by pair. Prompts and responses have their full length, so nothing is padding.

The token ratio M (S + R) / (S + M R) is what the reading alone would save; `reached` is the
measured ratio over it. `FLOPs` is the ratio of all operations: the head meets the same responses in
both, so a large vocabulary makes it smaller. `peak` is useful_flops / seconds as a share of this
machine's own float32 matrix product, measured first. `MB` is the peak memory of an update above
what the process held before it, each variant in a process of its own: the resident set on a CPU
(ru_maxrss), torch's allocator on a GPU.

Sampling is timed at the first shape: models.sample, and the same tokens drawn with prompt and
response read again for every one. Times are worth something on an idle machine only: the load at
the start is printed. Writes results/bench.json, or with --quick out/bench.json.

`--mfu` times whole updates of LIRE, optimiser included, in bfloat16, eager and under torch.compile
in turn. MFU is `useful_flops` over time, as a share of what the card's data sheet promises for
dense bfloat16 products.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import lire
import model as models
from experiments import peers
from experiments.cells import write_results
from experiments.timing import (
    in_own_process,
    peak_flops,
    peak_memory,
    quartiles,
    spread,
    timed_pairs,
)
from harness.pool import precision, set_numerics
from harness.update import update as optimizer_step
from train import Config

SHAPES = [(8, 64, 16), (8, 256, 32), (6, 128, 64), (2, 64, 32)]  # (M, S, R)
GPT2 = {"vocab_size": 50257, "context": 1024, "layers": 12, "heads": 12, "width": 768}
MODELS = {  # name -> (B, pairs, what differs from the default GPTConfig)
    "default": (16, 15, {}),
    "5m": (16, 15, {"layers": 6, "width": 256}),
    "gpt2": (1, 15, GPT2),
    "gpt2-x4": (4, 15, GPT2),  # four prompts: the weights are read once for all
    "v8k": (1, 15, {"vocab_size": 8192, "width": 64}),
    "v32k": (1, 15, {"vocab_size": 32768, "width": 64}),
    "v50k": (1, 15, {"vocab_size": 50257, "width": 64}),
}
# Dense bfloat16 FLOP/s by data sheet; of the names that stand in a card's own, the first counts.
BF16_PEAKS = {
    "NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "4090": 165e12,
}


def token_ratio(M: int, S: int, R: int) -> float:
    """M (S + R) / (S + M R): tokens read with the prompt repeated, over those with it read once.

    >>> token_ratio(8, 256, 32)
    4.5
    """
    return M * (S + R) / (S + M * R)


def useful_flops(config: models.GPTConfig, B: int, M: int, S: int, R: int) -> float:
    """Floating-point operations that an update of B lists cannot do without.

        B (6 W T + 6 V D (1 + M (R - 1)) + 12 L D A)

    A multiply-add counts 2, and backward is 2 x forward.
    W = 12 L D^2 weights of the blocks' matrices
    T = S + M (R - 1) tokens read (a response's last token predicts nothing)
    V D weights of the head, which sees the M (R - 1) response tokens and the last of the prompt
    A = S (S + 1) / 2 + M ((R - 1) S + (R - 1) R / 2) pairs (query, key) under the causal mask, of
        2 D multiply-adds each
    """
    L, D, V, own = config.layers, config.width, config.vocab_size, M * (R - 1)
    A = S * (S + 1) / 2 + own * S + own * R / 2
    return B * (6 * 12 * L * D**2 * (S + own) + 6 * V * D * (1 + own) + 12 * L * D * A)


def setup(
    name: str, shape: tuple[int, int, int], device: str, B: int | None = None
) -> tuple[models.GPT, data.Batch, data.Batch]:
    """A model, and a batch of B random lists of full length twice: with every prompt once, and
    with every prompt repeated M times."""
    (M, S, R), (default_B, _, size) = shape, MODELS[name]
    B = B or default_B
    torch.manual_seed(0)
    context = max(models.GPTConfig.context, S + R)
    config = models.GPTConfig(**{"context": context, "eos": -1} | size)  # no token ends a response
    model = models.GPT(config).to(device)
    prompts = torch.randint(config.vocab_size, (B, S), device=device)
    responses = torch.randint(config.vocab_size, (B, M, R), device=device)
    once = full_batch(prompts, responses)
    repeated = full_batch(prompts.repeat_interleave(M, 0), responses.flatten(0, 1)[:, None])
    return model, once, repeated


def full_batch(prompts: Tensor, responses: Tensor) -> data.Batch:
    """Prompts [B, S] and responses [B, M, R] without padding; all rewards 0."""
    ones = lambda shape: torch.ones(shape, dtype=torch.bool, device=prompts.device)
    lists = responses.shape[:2]  # B, M
    return data.Batch(
        prompts,
        ones(prompts.shape),
        responses,
        ones(responses.shape),
        ones(lists),
        torch.zeros(lists, device=prompts.device),
    )


def update(model: nn.Module, batch: data.Batch) -> None:
    """Forward and backward, from no gradients to gradients."""
    model.zero_grad()
    models.response_logps(model, batch).mean().backward()


@torch.no_grad()
def disagreement(model: nn.Module, once: data.Batch, repeated: data.Batch) -> float:
    """Largest difference between the two variants' log-probs, in nats.

    Raises: ValueError where they score differently.
    """
    logps, again = models.response_logps(model, once), models.response_logps(model, repeated)
    worst = (logps.flatten() - again.flatten()).abs().max().item()
    if not worst < 1e-5 * again.abs().max().item():
        raise ValueError(
            f"the two variants' log-probs differ by {worst} nats: there is nothing to compare"
        )
    return worst


@torch.no_grad()
def sample_uncached(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    M: int,
    max_tokens: int,
    generator: torch.Generator,
) -> Tensor:
    """models.sample without its cache: prompt and response are read again for every token.

    Returns: response_ids [B, M, R].
    """
    B = len(prompt_ids)
    prompt_ids = prompt_ids.repeat_interleave(M, 0)  # [B * M, S]
    prompt_mask = prompt_mask.repeat_interleave(M, 0)
    ids = torch.zeros(B * M, 1, max_tokens, dtype=torch.long, device=prompt_ids.device)
    for t in range(max_tokens):
        states = model.hidden(prompt_ids, prompt_mask, ids[..., : t + 1])[:, 0, t]  # [B * M, D]
        cdf = models.next_token_probs(model.head(states).float()).double().cumsum(-1)  # [B * M, V]
        u = torch.rand(B * M, 1, dtype=torch.float64, generator=generator, device=cdf.device)
        ids[:, 0, t] = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
    return ids.view(B, M, max_tokens)


def memory_of(name: str, shape: tuple[int, int, int], device: str, which: int) -> float:
    """Peak memory of two updates above what was held before, in MB.

    Call it in a fresh process (see `in_own_process`). which: 0 once, 1 repeated.
    """
    set_numerics(Config(device=device))
    model, *batches = setup(name, shape, device)
    before = peak_memory(device)
    for _ in range(2):
        update(model, batches[which])
    return peak_memory(device) - before


def measure(
    name: str,
    shape: tuple[int, int, int],
    device: str,
    pairs: int,
    peak: float,
    sampling: bool = False,
) -> dict[str, Any]:
    """One row of the table, as a dict; see the top of this file.

    sampling: time models.sample and `sample_uncached` too.
    """
    model, once, repeated = setup(name, shape, device)
    (B, S), (M, _, R) = once.prompt_ids.shape, shape
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        **{"B": B, "M": M, "S": S, "R": R},
        "pairs": pairs,
        "disagreement": disagreement(model, once, repeated),
    }
    times = timed_pairs(lambda: update(model, once), lambda: update(model, repeated), pairs, device)
    row |= {
        "once": quartiles(times[0]),
        "repeated": quartiles(times[1]),
        "ratio": quartiles([b / a for a, b in zip(*times)]),
        "token_ratio": token_ratio(M, S, R),
    }
    row["reached"] = row["ratio"][1] / row["token_ratio"]
    flops = useful_flops(model.config, B, M, S, R)
    row |= {
        "flops_ratio": useful_flops(model.config, B * M, 1, S, R) / flops,
        "peak_once": flops / row["once"][1] / peak,
        "peak_repeated": flops / row["repeated"][1] / peak,
    }
    if sampling:

        def draw(sampler: Callable) -> Tensor:
            generator = torch.Generator(device).manual_seed(0)
            return sampler(model, once.prompt_ids, once.prompt_mask, M, R, generator)

        row["sampling_pairs"] = min(pairs, 3)
        cached, uncached = lambda: draw(models.sample), lambda: draw(sample_uncached)
        times = timed_pairs(cached, uncached, row["sampling_pairs"], device)
        row |= {
            "sampled_cached": quartiles([B * M * R / s for s in times[0]]),
            "sampled_uncached": quartiles([B * M * R / s for s in times[1]]),
        }
    return row


def lire_update(model: nn.Module, batch: data.Batch, device: str, compiled: bool) -> Callable:
    """A whole update of LIRE in bfloat16, to be called again and again."""
    c = Config(device=device, dtype="bfloat16")
    score = torch.compile(models.response_logps) if compiled else models.response_logps
    groups = [{"params": list(model.parameters()), "peak": 1e-5}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    rewards = lire.transform_rewards(batch.rewards, batch.candidate_mask, "softmax")

    def step() -> None:
        with precision(c):
            logps = score(model, batch)
        loss = lire.lire_loss(logps, rewards, batch.candidate_mask, 16.0).mean()
        optimizer_step(optimizer, loss, 1, 1, 1.0)

    return step


def utilisation(
    card: str, name: str, B: int, shape: tuple[int, int, int], device: str, pairs: int
) -> list[dict[str, Any]]:
    """Seconds of LIRE's update, tokens a second, FLOP/s and MFU: eager and compiled.

    card: as torch names it; its MFU is None where BF16_PEAKS does not know it.
    """
    peak = next((flops for part, flops in BF16_PEAKS.items() if part in card), None)
    model, batch, _ = setup(name, shape, device, B)
    (M, S, R), flops = shape, useful_flops(model.config, B, *shape)
    batch.rewards.uniform_()
    steps = [lire_update(model, batch, device, compiled) for compiled in (False, True)]
    rows = []
    for how, times in zip(("eager", "compiled"), timed_pairs(*steps, pairs, device)):
        seconds = quartiles(times)
        row = {"how": how, "seconds": seconds, "tokens": B * (S + M * R) / seconds[1]}
        row |= {"flops": flops / seconds[1], "mfu": peak and flops / seconds[1] / peak}
        rows.append(row)
        share = "-" if peak is None else f"{row['mfu']:.0%} of {peak / 1e12:.0f}"
        print(
            f"{how:8} {spread(seconds, 1e3, 1)} ms, {row['tokens']:,.0f} tokens/s, "
            f"{row['flops'] / 1e12:.1f} TFLOP/s, MFU {share}"
        )
    return rows


COLUMNS = [  # title, width, text of a row
    ("model", 8, lambda row: row["model"]),
    ("B", 3, lambda row: row["B"]),
    ("M", 3, lambda row: row["M"]),
    ("S", 4, lambda row: row["S"]),
    ("R", 4, lambda row: row["R"]),
    ("ms once", 20, lambda row: spread(row["once"], 1e3, 0)),
    ("ms repeated", 20, lambda row: spread(row["repeated"], 1e3, 0)),
    ("repeated / once", 18, lambda row: spread(row["ratio"])),
    ("tokens", 7, lambda row: f"{row['token_ratio']:.2f}"),
    ("FLOPs", 7, lambda row: f"{row['flops_ratio']:.2f}"),
    ("reached", 8, lambda row: f"{row['reached']:.0%}"),
    ("peak once", 10, lambda row: f"{row['peak_once']:.0%}"),
    ("rep.", 5, lambda row: f"{row['peak_repeated']:.0%}"),
    ("MB once", 8, lambda row: f"{row['memory_once']:.0f}"),
    ("rep.", 6, lambda row: f"{row['memory_repeated']:.0f}"),
]


def show(row: dict[str, Any]) -> str:
    """A row of the table as text, and under it what sampling took."""
    line = "".join(f"{text(row)!s:>{width}}" for _, width, text in COLUMNS)
    if "sampled_cached" in row:
        line += (
            f"\n    sampling here, {row['sampling_pairs']} pairs: "
            f"{spread(row['sampled_cached'], 1, 0)} tokens/s with the cache, "
            f"{spread(row['sampled_uncached'], 1, 0)} without"
        )
    return line


HF_CASES = [("default", SHAPES[1]), *((name, SHAPES[0]) for name in ("5m", "gpt2", "gpt2-x4"))]
PEERS = {  # name -> (packages, cases)
    "hf": ("transformers", HF_CASES),
    "trl": ("trl datasets", [("5m", SHAPES[3])]),
}


PEER_COLUMNS = [  # title, width, text of a row
    *COLUMNS[:5],
    ("ms ours", 20, lambda row: spread(row["ours"], 1e3, 0)),
    ("ms theirs", 20, lambda row: spread(row["theirs"], 1e3, 0)),
    ("theirs / ours", 18, lambda row: spread(row["ratio"])),
    ("tokens", 7, lambda row: f"{row['token_ratio']:.2f}"),
    ("FLOPs", 7, lambda row: f"{row['flops_ratio']:.2f}" if row["flops_ratio"] else "-"),
]


def peer_row(peer: str, name: str, shape: tuple[int, int, int], pairs: int, device: str) -> dict:
    """One row of the table against another library."""
    model, once, _ = setup(name, shape, device)
    B, (M, S, R) = len(once.prompt_ids), shape
    row = {"model": name, "B": B, "M": M, "S": S, "R": R, "pairs": pairs, "flops_ratio": None}
    row["token_ratio"] = token_ratio(M, S, R)
    if peer == "trl":
        return row | peers.trl_row(model, B, S, R, pairs)
    flops = useful_flops(model.config, B, M, S, R)
    row["flops_ratio"] = peers.hf_flops(model.config, B, M, S, R) / flops
    return row | peers.hf_row(model, once, pairs, device)


def against(peer: str, cases: list, pairs: int | None, device: str, command: str) -> dict:
    """Measure against another library, print, write results/bench-PEER.json. Returns it."""
    set_numerics(Config(device=device))
    load, rows = os.getloadavg()[0], []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f}")
    print("".join(f"{title:>{width}}" for title, width, _ in PEER_COLUMNS))
    for name, shape in cases:
        row = peer_row(peer, name, shape, pairs or MODELS[name][1], device)
        rows.append(row)
        print("".join(f"{text(row)!s:>{width}}" for _, width, text in PEER_COLUMNS), flush=True)
    result = {"torch": torch.__version__, "load": load, "rows": rows}
    write_results(f"bench-{peer}", command, result)
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write results/bench.json, or with --quick out/bench.json. Returns it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, help="default: default and 5m")
    parser.add_argument("--pairs", type=int, help="timed pairs; default 15, with --quick 3")
    default_shapes = " ".join("{},{},{}".format(*shape) for shape in SHAPES)
    parser.add_argument("--shapes", nargs="+", help=f"M,S,R; default {default_shapes}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the first shape, the default model and 3 pairs, where not said otherwise",
    )
    parser.add_argument("--peer", choices=PEERS, help="measure against another library")
    parser.add_argument("--mfu", action="store_true", help="LIRE at the 124 M size on a GPU")
    args = parser.parse_args(argv)
    if args.mfu and not torch.cuda.is_available():
        print("--mfu is of a GPU's peak, and torch sees no GPU here")
        return {}
    if args.mfu:
        set_numerics(Config(device="cuda"))
        card = torch.cuda.get_device_name()
        print(f"torch {torch.__version__}, {card}: LIRE, 124 M, B 16, M 8, S 256, R 32, bfloat16")
        return {"card": card, "rows": utilisation(card, "gpt2", 16, (8, 256, 32), "cuda", 15)}
    try:
        shapes = SHAPES[:1] if args.quick else SHAPES
        if args.shapes:
            shapes = [tuple(map(int, text.split(","))) for text in args.shapes]
        if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
            raise ValueError
    except ValueError:
        parser.error("--shapes: expected M,S,R, three whole numbers above 0, such as 8,64,16")
    if args.pairs is not None and args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: expected 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    options = " ".join(sys.argv[1:] if argv is None else argv)
    command = f"python -m experiments.bench {options}".strip()
    if args.peer:
        packages, cases = PEERS[args.peer]
        if not all(map(importlib.util.find_spec, packages.split())):
            parser.error(f"--peer {args.peer} needs: pip install {packages}")
        if args.model or args.shapes:
            cases = [(name, shape) for name in args.model or ["default"] for shape in shapes]
        return against(args.peer, cases, args.pairs, args.device, command)
    names = args.model or (["default"] if args.quick else ["default", "5m"])
    cases = [(name, shape) for name in names for shape in shapes]

    # Programs that run already share the cores, and spoil the times.
    load = os.getloadavg()[0]
    memory = {  # first, while this process is small
        case: [in_own_process(memory_of, *case, args.device, which) for which in (0, 1)]
        for case in cases
    }
    set_numerics(Config(device=args.device))
    peak = peak_flops(args.device)
    device_name = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device_name = torch.cuda.get_device_name()
    print(
        f"torch {torch.__version__}, {device_name}, load {load:.1f}; "
        f"float32 product {peak / 1e9:.0f} GFLOP/s"
    )
    print("".join(f"{title:>{width}}" for title, width, _ in COLUMNS))
    rows = []
    for name, shape in cases:
        pairs = args.pairs or (3 if args.quick else MODELS[name][1])
        row = measure(name, shape, args.device, pairs, peak, sampling=shape == shapes[0])
        row |= dict(zip(("memory_once", "memory_repeated"), memory[name, shape]))
        rows.append(row)
        print(show(row), flush=True)
    pairs_of = {row["model"]: row["pairs"] for row in rows}
    counts = ", ".join(f"{name} {count}" for name, count in pairs_of.items())
    worst = max(row["disagreement"] for row in rows)
    print(f"pairs: {counts}; largest disagreement of a log-prob {worst:.0e} nats")
    result = {
        "torch": torch.__version__,
        "device": device_name,
        "load": load,
        "peak_flops": peak,
        "rows": rows,
    }
    if args.quick:
        Path("out").mkdir(exist_ok=True)
        Path("out/bench.json").write_text(json.dumps(result, indent=1))
    else:
        write_results("bench", command, result)
    return result


def table(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | B | M, S, R | prompt once, ms | repeated, ms | ratio [quartiles] | token ratio "
        "| ratio of operations | reached | memory, MB |",
        "|" + "---|" * 10,
    ]
    for row in results["rows"]:
        shape = f"{row['M']}, {row['S']}, {row['R']}"
        once, repeated = row["once"][1] * 1e3, row["repeated"][1] * 1e3
        memory = f"{row['memory_once']:.0f} against {row['memory_repeated']:.0f}"
        lines.append(
            f"| {row['model']} | {row['B']} | {shape} | {once:.0f} | {repeated:.0f} "
            f"| {spread(row['ratio'])} | {row['token_ratio']:.2f} | {row['flops_ratio']:.2f} "
            f"| {row['reached']:.0%} | {memory} |"
        )
    sampling = [row for row in results["rows"] if "sampled_cached" in row]
    for row in sampling:
        lines.append(
            f"\nSampling, {row['model']}: {spread(row['sampled_cached'], 1, 0)} tokens a second "
            f"with the cache, {spread(row['sampled_uncached'], 1, 0)} without."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
