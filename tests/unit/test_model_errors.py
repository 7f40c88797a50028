"""A process that cannot go on says why where the operator looks, in a form it can read."""

import json
from pathlib import Path

import pytest

from mizzen.runtime.errors import MizzenError, ModelNotFoundError, report_fatal

KUBELET_KEEPS_BYTES = 4096


def test_the_reason_and_the_sentence_reach_the_termination_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("MIZZEN_TERMINATION_LOG", str(log))
    assert report_fatal(ModelNotFoundError("There is no /m. Check the model's source.")) == 42
    assert json.loads(log.read_text()) == {
        "reason": "ModelNotFound",
        "message": "There is no /m. Check the model's source.",
    }
    assert "There is no /m." in capsys.readouterr().err


@pytest.mark.parametrize("letter", ["x", '"', "ß", "\U0001f40b"])
def test_a_long_message_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("MIZZEN_TERMINATION_LOG", str(log))
    report_fatal(MizzenError(letter * 100_000))
    assert len(log.read_bytes()) <= KUBELET_KEEPS_BYTES
    assert json.loads(log.read_text())["message"].startswith(letter)


def test_outside_a_pod_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIZZEN_TERMINATION_LOG", str(tmp_path / "missing" / "log"))
    assert report_fatal(MizzenError("no")) == 42
    assert not (tmp_path / "missing").exists()
