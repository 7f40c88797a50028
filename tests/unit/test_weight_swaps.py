"""Weights asked for again: followed, left alone, or loaded anew."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mizzen.runtime.errors import BadModelError
from mizzen.runtime.server.weights import WeightSwaps
from tests.fixtures.runtime_server import eventually


class Engine:
    """Takes weights when it may, and says what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    async def load(self, path: Path) -> None:
        self.told.append(path.name)
        await self.may_end.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
def engine() -> Engine:
    return Engine()


def weights(folder: Path, content: str = "1") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(content)
    return folder


async def test_who_asks_again_follows_the_swap_that_the_first_one_left(
    engine: Engine, tmp_path: Path
) -> None:
    swaps, path = WeightSwaps(engine.load), weights(tmp_path / "a")
    first = asyncio.create_task(swaps.ask(path))
    await eventually(lambda: engine.told == ["a"])
    first.cancel()
    await asyncio.wait((first,))
    again = asyncio.create_task(swaps.ask(path))
    await asyncio.sleep(0.05)
    assert engine.told == ["a"] and not again.done()
    engine.may_end.set()
    await asyncio.wait_for(again, 60)
    await swaps.ask(path)
    assert engine.told == ["a"]


async def test_other_weights_are_loaded_after_those_under_way_and_the_first_ones_again(
    engine: Engine, tmp_path: Path
) -> None:
    swaps, one, two = WeightSwaps(engine.load), weights(tmp_path / "a"), weights(tmp_path / "b")
    engine.may_end.set()
    for path in (one, two, two, one):
        await swaps.ask(path)
    assert engine.told == ["a", "b", "a"]


async def test_other_files_in_the_same_place_are_other_weights(
    engine: Engine, tmp_path: Path
) -> None:
    swaps = WeightSwaps(engine.load)
    engine.may_end.set()
    await swaps.ask(weights(tmp_path / "a"))
    await swaps.ask(weights(tmp_path / "a", "12"))
    assert engine.told == ["a", "a"]


async def test_what_was_refused_is_tried_again(engine: Engine, tmp_path: Path) -> None:
    swaps, path = WeightSwaps(engine.load), weights(tmp_path / "a")
    engine.may_end.set()
    engine.error = BadModelError("No.")
    with pytest.raises(BadModelError, match="No"):
        await swaps.ask(path)
    engine.error = None
    await swaps.ask(path)
    assert engine.told == ["a", "a"]
