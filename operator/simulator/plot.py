"""Replicas, demand and attainment over time as a picture; needs matplotlib (extra `simulator`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mizzen.operator.simulator.outcome import Moment, Outcome
from mizzen.operator.simulator.replica import Flight
from mizzen.operator.simulator.report import demand, is_met
from mizzen.operator.simulator.simulation import Objective, Setting
from mizzen.picture import check_picture, new_figure, save

_DEMAND_BIN_S = 30.0
_ATTAINMENT_BIN_S = 60.0


def plot(outcome: Outcome, setting: Setting, path: Path, *, title: str) -> None:
    """Write a picture of an outcome to an .svg or .png file.

    Raises:
        PictureError: as `check_picture`.
    """
    check_picture(path)
    moments = turning_points(outcome.moments)
    minutes = [moment.at / 60 for moment in moments]
    figure = new_figure(width=11, height=6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    requests = [flight.request for flight in outcome.flights]
    work = demand(requests, setting.profile, setting.objective, bin_s=_DEMAND_BIN_S)
    upper.stackplot(
        minutes,
        [moment.ready for moment in moments],
        [moment.starting for moment in moments],
        [moment.draining for moment in moments],
        labels=["ready", "starting", "draining"],
        colors=["#2a7f62", "#e0a030", "#a05080"],
        alpha=0.55,
    )
    upper.step(
        [at / 60 for at, _ in work],
        [load for _, load in work],
        where="post",
        color="black",
        lw=0.8,
        label="demand (replicas' worth of work)",
    )
    upper.step(minutes, [m.wanted for m in moments], where="post", lw=1, label="wanted")
    upper.set(ylabel="replicas", title=title)
    upper.margins(y=0.25)  # room for the legend
    upper.legend(loc="upper left", ncols=3, fontsize="small")
    shares = attainment_over_time(outcome.flights, setting.objective)
    lower.step([at / 60 for at, _ in shares], [share for _, share in shares], where="post")
    lower.set(ylabel="attainment", xlabel="minutes", ylim=(0, 1.05))
    save(figure, path)


def turning_points(moments: Sequence[Moment]) -> list[Moment]:
    """Return the moments without those that lie between two alike."""
    last = len(moments) - 1
    return [
        moment
        for index, moment in enumerate(moments)
        if index in (0, last)
        or not _is_alike(moments[index - 1], moment)
        or not _is_alike(moment, moments[index + 1])
    ]


def _is_alike(one: Moment, other: Moment) -> bool:
    return replace(one, at=other.at) == other


def attainment_over_time(
    flights: Sequence[Flight], objective: Objective
) -> list[tuple[float, float]]:
    """Return (time, share of well served requests that arrived then) by the minute."""
    total, met = Counter[int](), Counter[int]()
    for flight in flights:
        minute = int(flight.request.arrival_s / _ATTAINMENT_BIN_S)
        total[minute] += 1
        met[minute] += is_met(flight, objective)
    return [(minute * _ATTAINMENT_BIN_S, met[minute] / total[minute]) for minute in sorted(total)]
