"""What tests of the kernels share: the instruction sets of this machine, and what hypothesis draws from."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from sordino.runtime import kernels

LEVELS = kernels.available()
every_level = pytest.mark.parametrize("level", LEVELS)
needs_kernels = pytest.mark.skipif(not LEVELS, reason="no compiler was there when Sordino was installed")
examples = settings(max_examples=60, deadline=None, derandomize=True)
TYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**31)
