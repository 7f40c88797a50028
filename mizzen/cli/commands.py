"""The `mizzen` command: one word per process of the system.

A command only reads its settings and starts its part; every flag is a field of that part's
settings model, so `mizzen serve --help` and the environment variables cannot drift apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mizzen.cli import rollout
from mizzen.cli.approve import approve
from mizzen.cli.curve import curve
from mizzen.cli.plan import plan
from mizzen.cli.simulate import simulate

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

Settings = TypeVar("Settings", bound="BaseSettings")

app = typer.Typer(
    name="mizzen",
    help="Serve language models on Kubernetes and train the next ones on spare capacity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="API keys of the gateway.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(rollout.app, name="rollout")
app.command()(approve)
app.command()(curve)
app.command()(plan)
app.command()(simulate)

# The settings model of the part parses these commands' own flags, `--help` included.
_OWN_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _settings(model: type[Settings], arguments: list[str]) -> Settings:
    """Read a part's settings from its flags and the environment; a bad one is named, not dumped."""
    from pydantic import ValidationError
    from pydantic_settings import CliApp

    try:
        return CliApp.run(model, cli_args=arguments)
    except ValidationError as error:
        for problem in error.errors():
            name = "-".join(str(part) for part in problem["loc"]).replace("_", "-") or "settings"
            typer.echo(f"{name}: {problem['msg']} (got {problem.get('input')!r})", err=True)
        raise typer.Exit(2) from error


@app.command(context_settings=_OWN_FLAGS)
def serve(context: typer.Context) -> None:
    """Serve one model: OpenAI and Open Inference Protocol on 8000 and 8001, admin on 8002."""
    from mizzen.runtime.config import ServeConfig

    config = _settings(ServeConfig, context.args)
    if config.node_rank:
        from mizzen.runtime.server.follower import follow

        raise typer.Exit(follow(config))
    from mizzen.runtime.engine.spawn import EngineProcess

    process = EngineProcess()  # imports torch, while this one imports the server
    from mizzen.runtime.server.main import serve as run

    raise typer.Exit(run(config, process))


@app.command(context_settings=_OWN_FLAGS)
def gateway(context: typer.Context) -> None:
    """Run the front door: one OpenAI-compatible address for every served model."""
    from mizzen.runtime.gateway.config import GatewayConfig
    from mizzen.runtime.gateway.main import run

    raise typer.Exit(run(_settings(GatewayConfig, context.args)))


@app.command()
def operator() -> None:
    """Run the operator; its settings are MIZZEN_* environment variables."""
    from mizzen.operator.main import main as run

    run()


@app.command()
def train(
    config: Annotated[str, typer.Option(help="The job as JSON, as the operator mounts it.")],
) -> None:
    """Run one generation of a fine-tune job from its last committed checkpoint."""
    from pathlib import Path

    from mizzen.runtime.train.main import train as run

    raise typer.Exit(run(Path(config)))


_PER_POD = "Limit of the key in each gateway pod, which count by themselves; none when not set."


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Who the key is for: lower-case letters and -.")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help=_PER_POD)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help=_PER_POD)] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help=_PER_POD)] = None,
    priority: Annotated[
        int, typer.Option(min=-100, max=100, help="Of requests that wait the highest goes first.")
    ] = 0,
) -> None:
    """Print a new API key and, on standard output, the Secret that lets it in."""
    from mizzen.runtime.gateway.keys import print_key_secret
    from mizzen.runtime.gateway.limits import Limits

    limits = Limits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
        priority=priority,
    )
    try:
        print_key_secret(name, limits)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="mizzen")
