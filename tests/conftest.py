"""No network, no notices of other libraries, and the same random numbers in every test, whatever ran before it."""

import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

settings.register_profile("no hurry", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("no hurry")


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)
