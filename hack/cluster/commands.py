"""The command line: one function a command, each of a few lines."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hack.cluster import gobuild, registry
from hack.cluster.api_only import ApiCluster
from hack.cluster.errors import ClusterError
from hack.cluster.local_cluster import SERVERS, LocalCluster
from hack.cluster.progress import say, step
from hack.images import build as build_images
from hack.images import store as image_store


def build(_: argparse.Namespace) -> None:
    """Build the servers from their Go modules (cached)"""
    print(gobuild.build())


def check(_: argparse.Namespace) -> None:
    """Say what on this machine stands in the way of a cluster; changes nothing"""
    LocalCluster().check()
    say("Nothing stands in the way of a local cluster.")


def up(_: argparse.Namespace) -> None:
    """Start the cluster, or what of it does not run; idempotent"""
    cluster = LocalCluster()
    cluster.up()
    say(f"The cluster runs: export KUBECONFIG={cluster.layout.kubeconfig}")


def down(arguments: argparse.Namespace) -> None:
    """Stop the cluster and leave nothing on the host"""
    with step("Stopped the cluster"):
        LocalCluster().down(purge=arguments.purge)
        image_store.release(purge=arguments.purge)


def status(_: argparse.Namespace) -> None:
    """Say which servers run; fails when one does not"""
    cluster = LocalCluster()
    for name in SERVERS:
        pid = cluster.processes.running(name)
        print(f"{name:24} {f'running, pid {pid}' if pid else 'not running'}")
    missing = cluster.missing_servers()
    if missing:
        raise ClusterError("The cluster is not complete: start it with `up`.")


def base(arguments: argparse.Namespace) -> None:
    """Build the images' layers below the project: Debian and Python packages (cached)"""
    LocalCluster().start_registry()
    build_images.build_packages(slim_torch=not arguments.gpu)


def images(arguments: argparse.Namespace) -> None:
    """Build the images of the present sources and push them to the local registry"""
    slim_torch = not arguments.gpu
    if arguments.tags:
        tags = build_images.tags(slim_torch=slim_torch)
    else:
        LocalCluster().start_registry()
        # Not computed again at the end: sources that changed meanwhile are not in these images.
        tags = build_images.build_and_push(slim_torch=slim_torch)
    for target, tag in tags.items():
        print(f"{target}={tag}")


def env(_: argparse.Namespace) -> None:
    """Print the shell's exports for the cluster, to be read by eval"""
    print(f'export KUBECONFIG="{LocalCluster().layout.kubeconfig}"')
    if str(gobuild.binaries()) not in os.environ.get("PATH", "").split(":"):
        print(f'export PATH="{gobuild.binaries()}:$PATH"')
    print(f'export MIZZEN_REGISTRY="{registry.address()}"')


def fake_gpus(arguments: argparse.Namespace) -> None:
    """Give the node COUNT GPUs in name only, as nvidia.com/gpu"""
    LocalCluster().set_fake_gpus(arguments.count)


def fake_nodes(arguments: argparse.Namespace) -> None:
    """Add COUNT nodes played by kwok, tainted kwok.x-k8s.io/node=fake"""
    LocalCluster().add_fake_nodes(arguments.count, gpus=arguments.gpus)


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
    "check": check,
    "up": up,
    "down": down,
    "status": status,
    "base": base,
    "images": images,
    "env": env,
    "fake-gpus": fake_gpus,
    "fake-nodes": fake_nodes,
    "api-up": api_up,
    "api-down": api_down,
}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    root = argparse.ArgumentParser(prog="python3 -m hack.cluster", description="A local cluster.")
    subparsers = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {
        name: subparsers.add_parser(name, help=function.__doc__, description=function.__doc__)
        for name, function in COMMANDS.items()
    }
    purge = "delete the cluster's state too, images included"
    commands["down"].add_argument("--purge", action="store_true", help=purge)
    tags = "only print the tags for the present sources"
    commands["images"].add_argument("--tags", action="store_true", help=tags)
    gpu = "with what PyTorch needs on a GPU; without, it is left out to save time and disk"
    for name in ("base", "images"):
        commands[name].add_argument("--gpu", action="store_true", help=gpu)
    commands["fake-gpus"].add_argument("count", type=int, metavar="COUNT")
    commands["fake-nodes"].add_argument("count", type=int, metavar="COUNT")
    commands["fake-nodes"].add_argument("--gpus", type=int, default=8, help="GPUs of each node")
    for name in ("api-up", "api-down"):
        commands[name].add_argument("directory", type=Path, metavar="DIR")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is one sentence, not a traceback."""
    arguments = parser().parse_args(argv)
    try:
        COMMANDS[arguments.command](arguments)
    except ClusterError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted: the same command goes on from here.")
        return 130
    return 0
