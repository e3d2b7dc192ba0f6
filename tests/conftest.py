"""One thread for every test: networks this small gain nothing by two, and lose much where something else is running."""

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported; the runs that tests start as processes read it too
)

import pytest
import torch

from experiments import figures


@pytest.fixture(autouse=True)
def subnormal_numbers_stay():
    """train.main flushes subnormal numbers to zero for the whole process; other tests want them back."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session", autouse=True)
def pictures():
    """Drawing takes longer than a small run: in tests figures.draw does nothing, and this is the one that draws."""
    real = figures.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda folder: "curves: not drawn in tests")
        yield real
