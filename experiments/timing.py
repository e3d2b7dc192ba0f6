"""How a time or a memory is measured: in turn, by quartiles, in a process of its own."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def timed(call: Callable, device: str) -> float:
    """Seconds of call()."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def timed_pairs(
    first: Callable, second: Callable, pairs: int, device: str
) -> tuple[list[float], list[float]]:
    """Seconds of first() and of second(), `pairs` times each, after one run that is not measured.

    They run in turn, and the order is turned round every time.
    """
    first(), second()
    times = [], []
    for i in range(pairs):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            times[which].append(timed((first, second)[which], device))
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """[first quartile, median, third quartile]; a single number is all three."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def peak_flops(device: str) -> float:
    """The most floating-point operations a second of a few large float32 matrix products."""
    best = 0.0
    for n in (1024, 2048) if device == "cpu" else (4096, 8192):
        left, right = torch.rand(2, n, n, device=device)
        product = lambda left=left, right=right: left @ right
        best = max(best, *(2 * n**3 / timed(product, device) for _ in range(8)))
    return best


def peak_memory(device: str) -> float:
    """The most memory that this process has held so far, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_own_process(call: Callable, *args: Any) -> Any:
    """call(*args) in a new process.

    The parent must be small still: a child's ru_maxrss starts at its parent's resident set.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def spread(values: Sequence[float], scale: float = 1, digits: int = 2) -> str:
    """Quartiles as text: median [first, third]."""
    first, median, third = (f"{value * scale:.{digits}f}" for value in values)
    return f"{median} [{first} {third}]"
