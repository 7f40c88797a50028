"""Rollouts that go back, by themselves and on command, on a real API server and scheduler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hack.cluster import gobuild
from hack.cluster.api_only import ApiCluster
from tests.api.test_llmdeployment import Namespace, operator, runtimes, team, wait_until
from tests.fixtures.serving_world import FakeRuntimes

__all__ = ("operator", "runtimes", "team")  # fixtures
pytestmark = pytest.mark.api


def rollout(cluster: ApiCluster, team: Namespace, *words: str) -> str:
    """Run `mizzen rollout` as its user would, with the cluster's own kubectl."""
    found = subprocess.run(
        [sys.executable, "-m", "mizzen.cli", "rollout", *words, "-n", team.name],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "KUBECONFIG": str(cluster.kubeconfig),
            "PATH": f"{gobuild.binaries()}{os.pathsep}{os.environ['PATH']}",
        },
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def revision(team: Namespace) -> str:
    return str(team.llmd()["status"]["revision"])


def test_a_rollout_is_undone_on_command(cluster: ApiCluster, team: Namespace) -> None:
    team.apply(replicas=2)
    team.wait_ready()
    first = revision(team)
    assert "one revision so far" in rollout(cluster, team, "history", "smollm2")
    team.apply(replicas=2, engine={"maxNumSeqs": 8})
    team.wait_ready()
    assert revision(team) != first
    listed = rollout(cluster, team, "history", "smollm2").splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["1", first], ["2", revision(team)]]
    rollout(cluster, team, "pause", "smollm2")
    rollout(cluster, team, "undo", "smollm2")
    wait_until(lambda: team.ready()[1] == "Paused")
    rollout(cluster, team, "resume", "smollm2")
    team.wait_ready()
    assert revision(team) == first
    listed = rollout(cluster, team, "history", "smollm2").splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["2", "3"]
    team.kubectl("delete", "llmd", "smollm2")
    wait_until(lambda: team.get("controllerrevisions")["items"] == [])


def test_a_revision_that_finds_no_place_is_rolled_back(team: Namespace) -> None:
    pace = {"progressDeadlineSeconds": 10}
    team.apply(rollout=pace)
    team.wait_ready()
    before, proven = team.uids(), revision(team)
    nowhere = {"nodeSelector": {"kubernetes.io/hostname": "nowhere"}}
    team.apply(rollout=pace, podTemplatePatch=nowhere)
    wait_until(lambda: team.ready() == ("False", "RolledBack"))
    wait_until(lambda: team.uids() == before)
    assert "within 10 seconds" in team.message()
    assert revision(team) == proven
    events = team.get("events", "--field-selector=reason=RolledBack")["items"]
    assert [event["type"] for event in events] == ["Warning"]
    team.apply(rollout=pace)
    team.wait_ready()
    assert team.uids() == before


@contextmanager
def noted_weights(team: Namespace, notes: Path) -> Iterator[Callable[[], set[str]]]:
    """Note every weight of a canary by a watch, which misses none however slow the machine is."""
    weight = r"jsonpath={.status.rollout.canary.weight}{'\n'}"
    command = [gobuild.binaries() / "kubectl", f"--kubeconfig={team.cluster.kubeconfig}"]
    command += ["-n", team.name, "get", "llmd", "smollm2", "--watch", "-o", weight]
    with notes.open("wb") as out, subprocess.Popen(command, stdout=out) as watch:
        try:
            wait_until(lambda: notes.stat().st_size > 0)
            yield lambda: set(notes.read_text().split())
        finally:
            watch.terminate()


def test_a_canary_goes_step_by_step_and_a_wrong_answer_ends_it(
    team: Namespace, runtimes: FakeRuntimes, tmp_path: Path
) -> None:
    steps = [{"weight": 10, "holdSeconds": 2}, {"weight": 50, "holdSeconds": 2}]
    probe = {"prompt": "2 + 2 =", "expect": "4"}
    pace = {"canary": {"steps": steps, "rollbackOn": {"probe": probe}}}
    team.apply(replicas=2, rollout=pace)
    team.wait_ready()
    runtimes.answer = " 4."
    with noted_weights(team, tmp_path / "weights") as seen:
        team.apply(replicas=2, rollout=pace, engine={"maxNumSeqs": 8})
        team.wait_ready()
        wait_until(lambda: {"10", "50"} <= seen())
    wait_until(lambda: "rollout" not in team.llmd()["status"])
    wait_until(lambda: len(team.pods()) == 2)
    proven, before = revision(team), team.uids()
    runtimes.answer = " fish"
    team.apply(replicas=2, rollout=pace, engine={"maxNumSeqs": 9})
    wait_until(lambda: team.ready() == ("False", "RolledBack"))
    wait_until(lambda: team.uids() == before)
    assert revision(team) == proven
    assert "' fish'" in team.message()
