"""Lets `python -m mizzen.cli` stand for `mizzen` where the package is not installed."""

from mizzen.cli import main

main()
