"""Command line of Mizzen: `mizzen` and `python -m mizzen.cli`."""

from mizzen.cli.commands import main

__all__ = ["main"]
