"""The command line: one function a command, each of a few lines."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from hack.cluster import gobuild
from hack.cluster.api_only import ApiCluster
from hack.cluster.errors import ClusterError
from hack.cluster.progress import say, step


def build(_: argparse.Namespace) -> None:
    """Build the servers from their Go modules (cached)"""
    print(gobuild.build())


def api_up(arguments: argparse.Namespace) -> None:
    """Start a throw-away control plane without a node in DIR; needs no root"""
    cluster = ApiCluster(arguments.directory, die_with_parent=False)
    gobuild.build()
    with step("Started an API-only cluster"):
        cluster.start()
    print(f"export KUBECONFIG={cluster.kubeconfig}")


def api_down(arguments: argparse.Namespace) -> None:
    """Stop the control plane in DIR and delete it"""
    ApiCluster(arguments.directory, die_with_parent=False).stop()


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "build": build,
    "api-up": api_up,
    "api-down": api_down,
}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    root = argparse.ArgumentParser(prog="python3 -m hack.cluster", description="A local cluster.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        if name in ("api-up", "api-down"):
            command.add_argument("directory", type=Path, metavar="DIR")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is one sentence, not a traceback."""
    arguments = parser().parse_args(argv)
    try:
        COMMANDS[arguments.command](arguments)
    except ClusterError as error:
        say(f"error: {error}")
        return 1
    return 0
