"""One policy or many on one trace: the runs that comparisons are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mizzen.operator.simulator.outcome import Outcome
from mizzen.operator.simulator.policies.registry import build_policy
from mizzen.operator.simulator.report import Report, build_report
from mizzen.operator.simulator.simulation import Setting, simulate
from mizzen.operator.simulator.traces import Request


def run_policy(
    name: str, requests: Sequence[Request], setting: Setting, *, target: float | None = None
) -> tuple[Outcome, Report]:
    """Replay a trace against one policy.

    Raises:
        UnknownPolicyError: no policy has this name, or it has no target to set.
        RequestTooLargeError: a request needs more KV cache than a replica has.
    """
    policy = build_policy(name, setting, target=target)
    if name == "static":
        setting = replace(setting, initial_replicas=int(target or 1))
    outcome = simulate(requests, policy, setting)
    report = build_report(
        outcome, policy=policy.name, objective=setting.objective, gpus=setting.profile.gpus
    )
    return outcome, report


def best_static(requests: Sequence[Request], setting: Setting) -> tuple[Outcome, Report]:
    """Return the cheapest fixed size that meets the objective, or else the one that comes nearest.

    This is hindsight: the trace is replayed with every size within the bounds.
    """
    best: tuple[Outcome, Report] | None = None
    for replicas in range(max(1, setting.min_replicas), setting.max_replicas + 1):
        tried = run_policy("static", requests, setting, target=replicas)
        if best is None or tried[1].attainment > best[1].attainment:
            best = tried
        if tried[1].attainment >= setting.objective.attainment_ratio:
            break
    if best is None:
        raise ValueError(
            f"The bounds hold no size to try: min {setting.min_replicas}, max "
            f"{setting.max_replicas}."
        )
    outcome, report = best
    return outcome, replace(report, policy=f"static-best ({outcome.moments[0].wanted})")
