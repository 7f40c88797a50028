"""Adapters loaded into a running engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.engine.errors import (
    AdapterLoadError,
    GenerationFailedError,
    UnknownAdapterError,
)
from tests.fixtures.engine_models import (
    generate,
    greedy_reference,
    save_random_adapter,
    save_served_llama,
    tiny_config,
)

PROMPT = list(range(30, 70))
OUT = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_served_llama(path)
    return path


@pytest.fixture
async def engine(checkpoint: Path) -> AsyncIterator[Engine]:
    config = tiny_config(checkpoint, max_num_seqs=4, max_loras=2, max_lora_rank=8)
    started = Engine.start(config)
    yield started
    await started.stop()


def save_adapter(checkpoint: Path, directory: Path, *, seed: int, rank: int = 4) -> list[int]:
    """Write a random adapter with PEFT and return what PEFT generates with it."""
    model = save_random_adapter(checkpoint, directory, seed=seed, rank=rank)
    return greedy_reference(model, PROMPT, OUT)


async def test_each_request_gets_its_own_adapter(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    base = await generate(engine, PROMPT, max_tokens=OUT)
    expected = {
        name: save_adapter(checkpoint, tmp_path / name, seed=len(name)) for name in ["a", "bb"]
    }
    for name in expected:
        await engine.load_adapter(name, tmp_path / name)
    assert [state.name for state in engine.adapters()] == ["a", "bb"]
    names = [None, "a", "bb", "a"]
    got = await asyncio.gather(
        *(
            generate(engine, PROMPT, request_id=str(i), adapter=name, max_tokens=OUT)
            for i, name in enumerate(names)
        )
    )
    assert got == [base, expected["a"], expected["bb"], expected["a"]]
    assert base not in expected.values()
    engine._loop.scheduler.check()


async def test_new_weights_under_an_old_name_do_not_meet_the_old_ones_cache(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    old = save_adapter(checkpoint, tmp_path / "old", seed=1)
    new = save_adapter(checkpoint, tmp_path / "new", seed=2)
    await engine.load_adapter("support", tmp_path / "old")
    assert await generate(engine, PROMPT, adapter="support", max_tokens=OUT) == old
    running = asyncio.create_task(
        generate(engine, PROMPT, request_id="old", adapter="support", max_tokens=OUT)
    )
    await asyncio.sleep(0)
    await engine.load_adapter("support", tmp_path / "new")
    assert await generate(engine, PROMPT, adapter="support", max_tokens=OUT) == new
    assert await running == old  # it finishes on what it began with
    assert len(engine.adapters()) == 1


async def test_the_same_content_is_loaded_once(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    save_adapter(checkpoint, tmp_path / "a", seed=1)
    await engine.load_adapter("a", tmp_path / "a", digest="sha256:declared")
    before = engine.adapters()
    await engine.load_adapter("a", tmp_path / "a", digest="sha256:declared")
    assert engine.adapters() == before
    assert (before[0].digest, before[0].rank) == ("sha256:declared", 4)


async def test_an_unloaded_adapter_is_unknown_and_makes_room(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate("abc"):
        save_adapter(checkpoint, tmp_path / name, seed=seed)
    await engine.load_adapter("a", tmp_path / "a")
    await engine.load_adapter("b", tmp_path / "b")
    with pytest.raises(AdapterLoadError, match="2 adapters may be loaded, and these are: a, b"):
        await engine.load_adapter("c", tmp_path / "c")
    await engine.unload_adapter("a")
    with pytest.raises(UnknownAdapterError, match=r"No adapter is called 'a'. Loaded adapters: b"):
        await generate(engine, PROMPT, adapter="a", max_tokens=1)
    with pytest.raises(UnknownAdapterError):
        await engine.unload_adapter("a")
    await engine.load_adapter("c", tmp_path / "c")


async def test_an_adapter_that_cannot_be_used_changes_nothing(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    save_adapter(checkpoint, tmp_path / "large", seed=1, rank=16)
    with pytest.raises(AdapterLoadError, match=r"large cannot be loaded.*rank is 16.*limit of 8"):
        await engine.load_adapter("large", tmp_path / "large")
    with pytest.raises(AdapterLoadError, match=r"adapter_config.json"):
        await engine.load_adapter("absent", tmp_path / "absent")
    other = tmp_path / "other"
    save_served_llama(other, hidden_size=32)
    save_adapter(other, tmp_path / "misfit", seed=1)
    with pytest.raises(AdapterLoadError, match="does not fit this model"):
        await engine.load_adapter("misfit", tmp_path / "misfit")
    assert engine.adapters() == []
    assert engine.is_ready()


async def test_two_ranks_share_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    expected = save_adapter(checkpoint, tmp_path / "a", seed=1)
    engine = Engine.start(tiny_config(checkpoint, tensor_parallel_size=2))
    try:
        await engine.load_adapter("a", tmp_path / "a")
        assert await generate(engine, PROMPT, adapter="a", max_tokens=OUT) == expected
        await engine.unload_adapter("a")
        assert len(await generate(engine, PROMPT, max_tokens=OUT)) == OUT
    finally:
        await engine.stop()


@pytest.mark.parametrize("temperature", [0, 1])
async def test_numbers_that_overflow_end_their_own_request_and_leave_no_trace(
    engine: Engine, checkpoint: Path, tmp_path: Path, temperature: float
) -> None:
    base = await generate(engine, PROMPT, max_tokens=OUT)
    save_adapter(checkpoint, tmp_path / "broken", seed=1)
    file = tmp_path / "broken" / "adapter_model.safetensors"
    save_file({name: tensor * 1e38 for name, tensor in load_file(file).items()}, file)
    await engine.load_adapter("broken", tmp_path / "broken")
    company = [
        generate(engine, PROMPT, request_id="base", max_tokens=OUT),
        generate(engine, PROMPT, adapter="broken", temperature=temperature, top_p=0.9),
    ]
    good, failed = await asyncio.gather(*company, return_exceptions=True)
    assert good == base
    assert isinstance(failed, GenerationFailedError)
    # The very blocks that held what is not finite serve whoever comes next.
    again = [generate(engine, PROMPT, request_id=str(i), max_tokens=OUT) for i in range(4)]
    assert await asyncio.gather(*again) == [base] * 4
    engine._loop.scheduler.check()
    assert engine.is_ready()
