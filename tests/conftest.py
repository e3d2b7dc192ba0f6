import pytest
import torch


@pytest.fixture(autouse=True)
def subnormal_numbers_stay():
    """train.main flushes subnormal numbers to zero for the whole process; other tests want them back."""
    yield
    torch.set_flush_denormal(False)
