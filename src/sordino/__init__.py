"""Sordino: quantize large language models to few bits.

Importing this package registers the checkpoint format with transformers, so that afterwards
``AutoModelForCausalLM.from_pretrained`` loads a Sordino checkpoint like any other.
"""

from sordino.api import Result, load, quantize
from sordino.errors import InputError, SordinoError
from sordino.measure.evaluate import Evaluation, evaluate
from sordino.recipe import Recipe, load_recipe, presets
from sordino.runtime import plugin as _plugin  # noqa: F401  (registers with transformers)
from sordino.version import __version__

__all__ = [
    "Evaluation",
    "InputError",
    "Recipe",
    "Result",
    "SordinoError",
    "__version__",
    "evaluate",
    "load",
    "load_recipe",
    "presets",
    "quantize",
]
