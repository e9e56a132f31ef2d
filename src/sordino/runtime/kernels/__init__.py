"""Native CPU kernels for packed weights; torch does the same where they are missing. How they work: docs/kernels.md."""

from sordino.runtime.kernels.library import available, status, using

__all__ = ["available", "status", "using"]
