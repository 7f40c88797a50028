"""Run the demo, or with `deploy` only install the chart: `python3 -m hack.demo [deploy]`."""

from __future__ import annotations

import argparse
import os
import sys

from hack.demo import steps
from hack.demo.console import Console, DemoError
from hack.demo.target import (
    Images,
    build_local_images,
    images_from_environment,
    kubectl_of,
    prepare_downloads,
)


def main() -> int:
    """Run every step; what an earlier run has made is found and used."""
    parser = argparse.ArgumentParser(prog="python3 -m hack.demo", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("all", "deploy"), default="all")
    parser.add_argument("--until-answer", action="store_true", help="end at the first answer")
    options = parser.parse_args()
    target = os.environ.get("CLUSTER", "local")
    if target not in {"local", "current"}:
        print(f"CLUSTER is {target}: use local (the default) or current.", file=sys.stderr)
        return 2
    console = Console()
    try:
        run_demo(console, target, only_deploy=options.what == "deploy",
                 only_answer=options.until_answer)  # fmt: skip
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again: what is done stays done.", file=sys.stderr)
        return 130
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def run_demo(console: Console, target: str, *, only_deploy: bool, only_answer: bool) -> None:
    """Go from nothing to the answers of the model and of its adapter."""
    is_local = target == "local"
    if is_local:
        console.step("Check this machine", steps.check_machine)
    console.step(
        "Python environment" + (", Kubernetes binaries, base image" if is_local else ""),
        lambda: prepare_downloads(console, with_cluster=is_local),
    )
    images = images_from_environment()
    if is_local:
        console.step("Start the cluster", lambda: steps.start_cluster(console))
        built: list[Images] = []
        console.step("Images", lambda: built.append(build_local_images(console)))
        images = built[0]
    kubectl = kubectl_of(target)
    console.step("Install the Helm chart", lambda: steps.install_chart(kubectl, images))
    if only_deploy:
        return
    console.step(
        "A real model on a volume",
        lambda: steps.provide_model(console, kubectl, images, is_local=is_local),
    )
    console.step("kubectl apply: an LLMDeployment", lambda: steps.serve_model(console, kubectl))
    with steps.open_gateway(kubectl) as chat:
        console.step("Ask the model", lambda: chat.ask(steps.MODEL, steps.FIRST_QUESTION))
        if not only_answer:
            console.step("kubectl apply: a FineTuneJob", lambda: steps.train(console, kubectl))
            console.step(
                "Ask the adapter", lambda: chat.ask(steps.ADAPTED_MODEL, steps.ADAPTER_QUESTION)
            )
            console.step(
                "The same question to the base",
                lambda: chat.ask(steps.MODEL, steps.ADAPTER_QUESTION),
            )
    console.table()
    print(steps.next_commands(is_local=is_local, key=chat.key))


if __name__ == "__main__":
    sys.exit(main())
