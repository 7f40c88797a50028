"""One job run through the trainer's own process, for benchmarks that ask what its gate says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_job(root: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run `mizzen train` on a job that lives under `root`; return its last word.

    Raises:
        subprocess.CalledProcessError: the job failed; its log is on standard error.
    """
    root.mkdir(parents=True, exist_ok=True)
    config = root / "job.json"
    config.write_text(
        json.dumps(
            {
                "job": f"benchmark/{root.name}",
                "checkpoint": {"directory": str(root / "checkpoints")},
                "admin_port": 0,
                **job,
                "output": {"directory": str(root / "output"), **job["output"]},
            }
        )
    )
    last_word = root / "last-word"
    environment = {
        **os.environ,
        "MIZZEN_TERMINATION_LOG": str(last_word),
        "MIZZEN_ADMIN_TOKEN_FILE": str(root / "token"),
    }
    subprocess.run(
        [sys.executable, "-m", "mizzen.cli", "train", "--config", str(config)],
        env=environment,
        check=True,
        stdout=sys.stderr,
    )
    return dict(json.loads(last_word.read_text()))
