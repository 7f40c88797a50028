"""`kubectl mizzen approve` with a kubectl that is played."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mizzen.cli.commands import app

_KUBECTL = """#!/bin/sh
printf '%s\\n' "$*" >> "$HERE/log"
case "$*" in
    *get\\ finetunejob\\ none*) echo 'Error from server (NotFound): no' >&2; exit 1 ;;
    *get\\ finetunejob*) cat "$HERE/job.json" ;;
    *whoami*) echo '{"status": {"userInfo": {"username": "ada"}}}' ;;
esac
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    (tmp_path / "kubectl").write_text(_KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    return tmp_path


def approve(
    here: Path,
    *words: str,
    approval: str = "Manual",
    conditions: Sequence[dict[str, str]] = (),
    **annotations: str,
) -> Result:
    metadata: dict[str, Any] = {"name": "support", "annotations": annotations}
    job = {
        "metadata": metadata,
        "spec": {"promotion": {"approval": approval}},
        "status": {"conditions": conditions},
    }
    (here / "job.json").write_text(json.dumps(job))
    return CliRunner().invoke(app, ["approve", *words])


def test_approving_writes_who_approved_onto_the_job(here: Path) -> None:
    done = approve(here, "support", "-n", "team")
    assert (done.exit_code, done.output) == (0, "support is approved by ada.\n")
    asked = (here / "log").read_text().splitlines()
    assert asked[-1] == "--namespace=team annotate finetunejob support mizzen.dev/approve=ada"


def test_approving_twice_keeps_the_first_name(here: Path) -> None:
    done = approve(here, "support", **{"mizzen.dev/approve": "grace"})
    assert (done.exit_code, done.output) == (0, "support was approved by grace.\n")
    assert "annotate" not in (here / "log").read_text()


def test_a_job_that_needs_no_approval_is_left_alone(here: Path) -> None:
    done = approve(here, "support", approval="Auto")
    assert done.exit_code == 1
    assert "support needs no approval" in done.output


def test_a_job_whose_model_was_rolled_back_is_not_approved_again(here: Path) -> None:
    why = "The deployment was rolled back to the model before: it answers slowly."
    failed = {"type": "Failed", "status": "True", "reason": "RolledBack", "message": why}
    done = approve(here, "support", conditions=[failed], **{"mizzen.dev/approve": "grace"})
    assert done.exit_code == 1
    assert done.output == (
        f"support has failed, so its result is not served; submit the job anew. {why}\n"
    )
    fine = {**failed, "status": "False"}
    assert approve(here, "support", conditions=[fine]).exit_code == 0


def test_a_job_that_is_not_there_is_said_so(here: Path) -> None:
    done = approve(here, "none")
    assert done.exit_code == 1
    assert "NotFound" in done.output
