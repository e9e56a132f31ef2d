"""Sordino: quantize large language models to few bits.

Importing this package registers the checkpoint format with transformers, so that afterwards
``AutoModelForCausalLM.from_pretrained`` loads a Sordino checkpoint like any other.
"""

import sys
from typing import TYPE_CHECKING

from sordino.errors import InputError, SordinoError
from sordino.version import __version__

if TYPE_CHECKING or "sordino_cli" not in sys.modules:  # the command line imports the rest when it is needed
    from sordino.api import Result, load, quantize
    from sordino.measure.evaluate import Evaluation, evaluate
    from sordino.recipe import Recipe, load_recipe, presets
    from sordino.runtime import plugin as _plugin  # noqa: F401  (registers with transformers)

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
