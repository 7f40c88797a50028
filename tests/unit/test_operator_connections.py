"""What an operator has opened is closed when it ends."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest

from mizzen.operator.config import OperatorConfig
from mizzen.operator.main import assemble, hang_up
from mizzen.operator.metrics.figures import Target
from tests.fixtures.memory_api import MemoryApi

NOBODY = "127.0.0.1"
TARGET = Target(name=("team", "chat"), settled=1, addresses=("127.0.0.1:9",))


@pytest.mark.parametrize("prometheus_url", ["", "http://127.0.0.1:9"], ids=["scrape", "prometheus"])
async def test_an_operator_that_ends_leaves_no_connection_open(
    tmp_path: Path, prometheus_url: str
) -> None:
    config = OperatorConfig(admin_token_file=tmp_path / "token", prometheus_url=prometheus_url)
    parts = assemble(config, MemoryApi())
    await parts.facts.runtimes.model(NOBODY)
    await parts.facts.trainers.progress(NOBODY)
    await parts.metrics.collect([TARGET])
    await parts.facts.metrics.collect([TARGET])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        await hang_up(parts)
        del parts
        gc.collect()
    assert not [str(one.message) for one in told if "client session" in str(one.message)]
