"""Run the demo, or one part of it: `python3 -m hack.demo [deploy | model]`."""

from __future__ import annotations

import argparse
import os
import sys

from hack.demo import steps
from hack.demo.console import Console, DemoError
from hack.demo.kubectl import Kubectl
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
    parser.add_argument("what", nargs="?", choices=("all", "deploy", "model"), default="all")
    parser.add_argument("--until-answer", action="store_true", help="end at the first answer")
    options = parser.parse_args()
    target = os.environ.get("CLUSTER", "local")
    if target not in {"local", "current"}:
        print(f"CLUSTER is {target}: use local (the default) or current.", file=sys.stderr)
        return 2
    console = Console()
    try:
        Demo(console, target).run(options.what, until_answer=options.until_answer)
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again: what is done stays done.", file=sys.stderr)
        return 130
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


class Demo:
    """The way from nothing to the answers of the model and of its adapter."""

    def __init__(self, console: Console, target: str) -> None:
        self._console = console
        self._is_local = target == "local"
        self._target = target

    def run(self, what: str, *, until_answer: bool) -> None:
        """Run everything, or up to and including one part."""
        step = self._console.step
        if self._is_local:
            images = self._images()
        else:
            step("Python environment", lambda: prepare_downloads(self._console, is_local=False))
            images = images_from_environment()
        kubectl = kubectl_of(self._target)
        if what != "model":
            step("Install the Helm chart", lambda: steps.install_chart(kubectl, images))
        if what != "deploy":
            step(
                "A real model on a volume",
                lambda: steps.provide_model(
                    self._console, kubectl, images, is_local=self._is_local
                ),
            )
        if what == "all":
            self._talk(kubectl, until_answer=until_answer)

    def _images(self) -> Images:
        """Have the local cluster run, with both images in its registry."""
        step = self._console.step
        step("Check this machine", steps.check_machine)
        step(
            "Python environment, Kubernetes binaries, base image",
            lambda: prepare_downloads(self._console, is_local=True),
        )
        step("Start the cluster", lambda: steps.start_cluster(self._console))
        built: list[Images] = []
        step("Images", lambda: built.append(build_local_images(self._console)))
        return built[0]

    def _talk(self, kubectl: Kubectl, *, until_answer: bool) -> None:
        console, step = self._console, self._console.step
        step("kubectl apply: an LLMDeployment", lambda: steps.serve_model(console, kubectl))
        with steps.open_gateway(kubectl) as chat:
            step("Ask the model", lambda: chat.ask(steps.MODEL, steps.FIRST_QUESTION))
            if not until_answer:
                step("kubectl apply: a FineTuneJob", lambda: steps.train(console, kubectl))
                question = steps.ADAPTER_QUESTION
                step("Ask the adapter", lambda: chat.ask(steps.ADAPTED_MODEL, question))
                step("Ask the base model the same", lambda: chat.ask(steps.MODEL, question))
            console.table()
            print(steps.next_commands(is_local=self._is_local, key=chat.key))


if __name__ == "__main__":
    sys.exit(main())
