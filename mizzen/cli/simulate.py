"""`mizzen simulate`: a recorded trace replayed against an autoscaling policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mizzen.operator.simulator.outcome import Outcome
    from mizzen.operator.simulator.report import Report
    from mizzen.operator.simulator.simulation import Setting
    from mizzen.operator.simulator.traces import Request


def simulate(
    trace: Annotated[Path, typer.Option(help="The recorded requests.")],
    format: Annotated[str, typer.Option(help="azure, mooncake, csv or jsonl.")] = "azure",
    policy: Annotated[
        str,
        typer.Option(
            help="Who decides on the number of replicas: mizzen, static, static-best, hpa-queue, "
            "hpa-kv, keda-concurrency, knative-kpa, knative-kpa-delayed, kubeai, wva, dynamo-load."
        ),
    ] = "mizzen",
    target: Annotated[
        float | None,
        typer.Option(help="The policy's one number, such as static's replicas; its own default."),
    ] = None,
    ttft_ms: Annotated[float, typer.Option(help="Objective: time to the first token.")] = 2000,
    itl_ms: Annotated[float, typer.Option(help="Objective: mean gap between two tokens.")] = 100,
    attainment: Annotated[
        float, typer.Option(min=0, max=1, help="Objective: share of requests that meet both.")
    ] = 0.95,
    min: Annotated[int, typer.Option(help="Fewest replicas.")] = 1,
    max: Annotated[int, typer.Option(help="Most replicas.")] = 32,
    initial: Annotated[int | None, typer.Option(help="Replicas at the start; min or 1.")] = None,
    times: Annotated[int, typer.Option(help="Send each request so many times.")] = 1,
    start_seconds: Annotated[float, typer.Option(help="Median start-up of a replica.")] = 90,
    start_p90_seconds: Annotated[
        float | None, typer.Option(help="90 % of start-ups are faster; 1.2 x the median.")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(help="Longest drain of a replica.")] = 120,
    step_ms: Annotated[float, typer.Option(help="Engine: milliseconds of a step as such.")] = 28.5,
    step_per_sequence_ms: Annotated[
        float, typer.Option(help="Engine: more of them for each decoding sequence.")
    ] = 0.33,
    step_per_prompt_token_ms: Annotated[
        float, typer.Option(help="Engine: more of them for each prompt token.")
    ] = 0.105,
    kv_tokens: Annotated[int, typer.Option(help="Engine: tokens that the KV cache holds.")] = (
        450_000
    ),
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Engine: most tokens computed in one step.")
    ] = 2048,
    gpus: Annotated[int, typer.Option(help="GPUs of one replica.")] = 4,
    warm_up_seconds: Annotated[
        float, typer.Option(help="Simulate this long before anything counts.")
    ] = 0,
    lend: Annotated[bool, typer.Option(help="Lend idle GPUs to fine-tune jobs.")] = False,
    reserve: Annotated[
        int, typer.Option(min=0, help="With --lend: replicas whose GPUs are never lent.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the start-up times.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: .svg or .png.")] = None,
) -> None:
    """Replay a trace against an autoscaling policy and print what it achieved and cost."""
    from mizzen.operator.simulator.arbiter import Lending
    from mizzen.operator.simulator.plot import plot as draw
    from mizzen.operator.simulator.replica_profile import Profile, StartUp
    from mizzen.operator.simulator.simulation import Objective, Setting
    from mizzen.operator.simulator.traces import load_trace, parse_format
    from mizzen.operator.simulator.workloads import multiply
    from mizzen.picture import PictureError, check_picture

    if min > max:
        typer.echo(f"--min {min} is above --max {max}.", err=True)
        raise typer.Exit(2)
    if reserve and not lend:
        typer.echo("--reserve is for --lend: without it nothing is lent. Add --lend.", err=True)
        raise typer.Exit(2)
    try:
        setting = Setting(
            profile=Profile(
                step_s=step_ms / 1000,
                step_per_sequence_s=step_per_sequence_ms / 1000,
                step_per_prompt_token_s=step_per_prompt_token_ms / 1000,
                kv_tokens=kv_tokens,
                budget_tokens=max_num_batched_tokens,
                gpus=gpus,
                start_up=StartUp(
                    median_s=start_seconds, p90_s=start_p90_seconds or 1.2 * start_seconds
                ),
            ),
            objective=Objective(
                ttft_s=ttft_ms / 1000, itl_s=itl_ms / 1000, attainment_ratio=attainment
            ),
            min_replicas=min,
            max_replicas=max,
            initial_replicas=initial if initial is not None else min or 1,
            drain_s=drain_seconds,
            lending=Lending(reserve=reserve) if lend else None,
            warm_up_s=warm_up_seconds,
            seed=seed,
        )
        if plot is not None:
            check_picture(plot)
        requests = multiply(load_trace(trace, parse_format(format)), times, seed=seed)
        outcome, report = _run(policy, target, requests, setting)
        if plot is not None:
            draw(outcome, setting, plot, title=f"{report.policy} on {trace.name}")
    except (ValueError, PictureError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    document = asdict(report)
    typer.echo(json.dumps(document, indent=2) if as_json else _as_text(document))


def _run(
    policy: str, target: float | None, requests: list[Request], setting: Setting
) -> tuple[Outcome, Report]:
    from mizzen.operator.simulator.experiment import best_static, run_policy

    if policy == "static-best":
        return best_static(requests, setting)
    return run_policy(policy, requests, setting, target=target)


def _as_text(document: dict[str, object], indent: str = "") -> str:
    lines = []
    for name, value in document.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [label, _as_text(value, indent + "  ")]
        else:
            shown = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            lines.append(f"{label:<24}{'-' if shown is None else shown}")
    return "\n".join(lines)
