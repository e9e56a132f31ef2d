"""Native CPU kernels for packed weights; torch does the same where they are missing. How they work: docs/kernels.md."""

from sordino.runtime.kernels.library import active, available, status, using

__all__ = ["active", "available", "status", "using"]
