"""Shared fixtures: no network, one tiny random model of each family, the real default model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
