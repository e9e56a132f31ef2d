"""Starts the command line. Help, the version and mistyped options need not wait for torch and transformers.

While this package is there, ``import sordino`` imports nothing large; every command imports what it needs.
"""


def main() -> None:
    """Entry point of the command ``sordino``."""
    from sordino.cli import main as run

    run()
