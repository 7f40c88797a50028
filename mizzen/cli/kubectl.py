"""The kubectl beside our command: a user needs no rights but their own, and no other client."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

Json = dict[str, Any]
# Plugins get kubectl's own options only behind the command.
Namespace = Annotated[str | None, typer.Option("-n", "--namespace", help="As kubectl has it.")]
Context = Annotated[str | None, typer.Option("--context", help="As kubectl has it.")]


class KubectlError(Exception):
    """It cannot be done; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Kubectl:
    """The kubectl beside this command, told which cluster and namespace."""

    flags: tuple[str, ...] = ()

    def __call__(self, *arguments: str) -> str:
        """Run it; return what it printed.

        Raises:
            KubectlError: it is not there, or it refused.
        """
        try:
            done = subprocess.run(
                ["kubectl", *self.flags, *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise KubectlError("kubectl is not on the PATH: install it.") from error
        if done.returncode:
            raise KubectlError(done.stderr.strip())
        return done.stdout

    def get(self, *what: str) -> Json:
        """Return what `kubectl get` shows."""
        document: Json = json.loads(self("get", *what, "-o", "json"))
        return document


def run(
    command: Callable[[Kubectl, str], str], name: str, namespace: str | None, context: str | None
) -> None:
    """Run a command about one resource: print what it says, end with 1 where it cannot be done."""
    given = {"--namespace": namespace, "--context": context}
    kubectl = Kubectl(tuple(f"{flag}={value}" for flag, value in given.items() if value))
    try:
        typer.echo(command(kubectl, name))
    except KubectlError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
