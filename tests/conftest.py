"""What every test needs: one thread, subnormal numbers, no pictures; one finished run for many."""

import os

# Networks this small gain nothing by two threads, and lose much where something else is running.
# Set before torch is imported; the runs that tests start as processes read it too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import small

import train


@pytest.fixture(autouse=True)
def subnormal_numbers_stay():
    """train.main flushes subnormal numbers to zero for the whole process; other tests want them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session", autouse=True)
def pictures():
    """Drawing takes longer than a small run: here a run draws nothing, and this is what draws."""
    real = train.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda folder: "curves: not drawn in tests")
        yield real


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pictures):
    """(folder, metrics) of a finished run; its neighbours find its reference in the cache."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train.main(small(folder))
