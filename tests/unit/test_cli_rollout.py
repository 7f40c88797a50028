"""`kubectl mizzen rollout` with a kubectl that is played: what it asks for, what it changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mizzen.cli.commands import app

Json = dict[str, Any]

_KUBECTL = """#!/bin/sh
printf '%s\\n' "$*" >> "$LOG"
case "$*" in
    *get\\ llmdeployment*) cat "$HERE/llmdeployment.json" ;;
    *get\\ controllerrevisions*) cat "$HERE/revisions.json" ;;
    *refused*) echo 'Error from server (Forbidden): no' >&2; exit 1 ;;
esac
"""
SPEC: Json = {"model": {"source": "file:///new"}, "engine": {"maxNumSeqs": 4}, "replicas": 3}


def revision(number: int, model: str, *, uid: str = "u") -> Json:
    metadata = {
        "labels": {"mizzen.dev/revision": f"hash{number}"}, "ownerReferences": [{"uid": uid}],
    }  # fmt: skip
    data = {"spec": {"model": {"source": model}}, "image": "runtime:1"}
    return {"metadata": metadata, "revision": number, "data": data}


class Cluster:
    """A kubectl on the PATH, and what it was asked."""

    def __init__(self, folder: Path, revisions: list[Json]) -> None:
        self.folder = folder
        self.write(revisions)
        kubectl = folder / "kubectl"
        kubectl.write_text(_KUBECTL)
        kubectl.chmod(0o755)

    def write(self, revisions: list[Json]) -> None:
        resource = {
            "metadata": {"name": "chat", "uid": "u", "resourceVersion": "7", "generation": 3},
            "spec": SPEC,
            "status": {"revision": "hash2"},
        }
        (self.folder / "llmdeployment.json").write_text(json.dumps(resource))
        (self.folder / "revisions.json").write_text(json.dumps({"items": revisions}))

    @property
    def asked(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    def rollout(self, *words: str) -> Result:
        return CliRunner().invoke(app, ["rollout", *words])


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return Cluster(
        tmp_path,
        # Out of order, and one of a deployment that had the name before.
        [
            revision(2, "file:///new"),
            revision(1, "file:///old"),
            revision(9, "file:///x", uid="v"),
        ],
    )


def test_history_lists_the_revisions_and_says_which_is_current(cluster: Cluster) -> None:
    result = cluster.rollout("history", "chat", "-n", "team")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["REVISION", "HASH", "MODEL", "IMAGE", "STATE"],
        ["1", "hash1", "file:///old", "runtime:1"],
        ["2", "hash2", "file:///new", "runtime:1", "current"],
    ]
    assert all(line.startswith("--namespace=team get") for line in cluster.asked)


def test_undo_brings_the_revision_before_back_and_keeps_the_size(cluster: Cluster) -> None:
    result = cluster.rollout("undo", "chat")
    assert (result.exit_code, result.stdout) == (0, "chat goes back to revision 1.\n")
    patch = json.loads(cluster.asked[-1].partition(" -p ")[2])
    assert patch == [
        {"op": "test", "path": "/metadata/generation", "value": 3},
        {
            "op": "replace",
            "path": "/spec",
            "value": {"model": {"source": "file:///old"}, "replicas": 3},
        },
    ]


def test_undo_names_the_revisions_there_are(cluster: Cluster) -> None:
    result = cluster.rollout("undo", "chat", "--to-revision", "5")
    assert result.exit_code == 1
    assert result.stderr == "chat has no revision 5. There are: 1, 2.\n"


def test_undo_says_whose_model_is_served_instead_of_the_specs(cluster: Cluster) -> None:
    path = cluster.folder / "llmdeployment.json"
    resource = json.loads(path.read_text())
    resource["status"]["promotedModel"] = {"job": "tune", "revision": "hash2"}
    path.write_text(json.dumps(resource))
    result = cluster.rollout("undo", "chat")
    assert result.exit_code == 1
    assert result.stderr == (
        "chat serves the model of job tune. Delete that job, or take its approval away, "
        "to go back.\n"
    )
    assert not any(" patch " in f" {line} " for line in cluster.asked)


def test_without_a_past_there_is_nothing_to_undo_or_to_list(cluster: Cluster) -> None:
    cluster.write([])
    assert "no earlier revision" in cluster.rollout("undo", "chat").stderr
    assert cluster.rollout("history", "chat").stdout == "chat has had one revision so far.\n"


def test_what_kubectl_refuses_is_passed_on(cluster: Cluster) -> None:
    result = cluster.rollout("pause", "refused")
    assert result.exit_code == 1
    assert result.stderr == "Error from server (Forbidden): no\n"


def test_without_kubectl_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["rollout", "history", "chat"])
    assert result.stderr == "kubectl is not on the PATH: install it.\n"


@pytest.mark.parametrize(("word", "paused"), [("pause", True), ("resume", False)])
def test_pause_and_resume_set_the_specs_field(cluster: Cluster, word: str, paused: bool) -> None:
    assert cluster.rollout(word, "chat", "--context", "c").exit_code == 0
    patch = json.dumps({"spec": {"rollout": {"paused": paused}}})
    assert cluster.asked == [f"--context=c patch llmdeployment chat --type=merge -p {patch}"]
