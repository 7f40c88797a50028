"""What batches have on their volume, and who waits for it: never the gateway's event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from mizzen.runtime.gateway.batches.job import Job, Work, to_its_end
from mizzen.runtime.gateway.batches.lines import Line, LineAnswer
from mizzen.runtime.gateway.batches.records import Batch, StoredFile
from mizzen.runtime.gateway.batches.shelf import Shelf, claim, mend, remove_expired
from mizzen.runtime.gateway.server import Gateway
from tests.fixtures.batches import UNRUN, client_of, jsonl, line
from tests.fixtures.gateway_house import MakeHouse, open_houses, until


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


def test_one_claim_at_a_time_and_a_batch_that_was_never_written_down_is_let_go(
    tmp_path: Path,
) -> None:
    batch = UNRUN
    Shelf(tmp_path, "me").put_batch(batch)
    first = claim(tmp_path, batch.id)
    assert first is not None and first.owner == "me"
    assert not first.is_stray()
    assert claim(tmp_path, batch.id) is None
    first.release()
    again = claim(tmp_path, batch.id)
    assert again is not None
    again.finish()
    again.release()
    assert claim(tmp_path, batch.id) is None


async def test_what_is_older_than_the_setting_says_is_removed(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path, "")
    old = StoredFile("file-" + "a" * 32, "old", "batch", 1, created_at_s=0, expires_at_s=1)
    shelf.data(old.id).write_bytes(b"x")
    shelf.put_file(old)
    gateway: Gateway = (await make_house(batches_dir=tmp_path)).gateway
    await until(lambda: shelf.file(old.id) is None and not shelf.data(old.id).exists())
    assert gateway.config.batches_keep_days == 30


def test_what_an_upload_left_that_never_ended_is_removed_and_what_a_batch_writes_is_not(
    tmp_path: Path,
) -> None:
    shelf = Shelf(tmp_path, "me")
    left, written, known = (shelf.data(f"file-{letter * 32}") for letter in "abc")
    stored = StoredFile("file-" + "c" * 32, "c", "batch", 1, created_at_s=0, expires_at_s=10**9)
    shelf.put_file(stored)
    for path, at_s in ((left, 0), (written, 2 * 86400), (known, 0)):
        path.write_bytes(b"x")
        os.utime(path, (at_s, at_s))
    remove_expired(tmp_path, now_s=9 * 86400, keep_s=86400)
    assert [path.exists() for path in (left, written, known)] == [False, True, True]


async def test_a_volume_that_fails_is_said_to_the_client(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.write_text("not a folder")
    client = client_of(await make_house(batches_dir=volume))
    with pytest.raises(openai.InternalServerError, match="volume for files fails") as raised:
        await client.files.create(file=b"x", purpose="batch")
    assert raised.value.status_code == 507


async def test_a_file_whose_content_is_gone_is_the_volume_s_failure(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    client = client_of(await make_house(batches_dir=tmp_path))
    stored = await client.files.create(file=b"x", purpose="batch")
    Shelf(tmp_path, "").data(stored.id).unlink()
    with pytest.raises(openai.InternalServerError, match="volume for files fails") as raised:
        await client.files.content(stored.id)
    assert raised.value.status_code == 507


def test_a_file_of_answers_is_taken_up_without_its_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    assert mend(path) == set()
    whole = jsonl({"custom_id": "a"}, {"custom_id": "b"})
    path.write_bytes(whole + b'{"custom_id": "torn')
    assert mend(path) == {"a", "b"}
    assert path.read_bytes() == whole
    assert mend(path) == {"a", "b"}


def test_a_file_of_answers_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path, size_bytes = tmp_path / "answers", 2**18
    path.write_bytes(jsonl(*({"custom_id": str(n), "x": "x" * size_bytes} for n in range(64))))
    tracemalloc.start()
    try:
        assert len(mend(path)) == 64
        assert tracemalloc.get_traced_memory()[1] < 16 * size_bytes
    finally:
        tracemalloc.stop()


class ThreadedShelf(Shelf):
    """A volume that the event loop may not touch."""

    loop_thread = 0

    def data(self, file_id: str) -> Path:
        assert threading.get_ident() != self.loop_thread
        return super().data(file_id)

    def put_batch(self, batch: Batch) -> None:
        assert threading.get_ident() != self.loop_thread
        super().put_batch(batch)


async def test_no_answer_of_a_batch_keeps_the_event_loop_waiting_for_the_volume(
    tmp_path: Path,
) -> None:
    shelf = ThreadedShelf(tmp_path, UNRUN.owner)
    shelf.data(UNRUN.input_file_id).write_bytes(jsonl(*map(line, range(3))))
    shelf.put_batch(UNRUN)
    shelf.loop_thread = threading.get_ident()

    async def ask(batch: Batch, asked: Line, request_id: str) -> LineAnswer:
        return LineAnswer(404 if asked.custom_id == "line-1" else 200, b"{}")

    work = Work(
        ask=ask,
        parallel=2,
        is_draining=lambda: False,
        has_key=lambda owner: True,
        now_s=lambda: 0,
        most_lines=10,
        most_line_bytes=2**20,
        keep_s=1,
    )
    job = Job(shelf, UNRUN, work)
    await job.run()
    assert (job.batch.status, job.batch.completed, job.batch.failed) == ("completed", 2, 1)
    shelf.loop_thread = 0
    assert mend(shelf.data(UNRUN.output_id)) == {"line-0", "line-2"}
    assert mend(shelf.data(UNRUN.errors_id)) == {"line-1"}


@pytest.mark.parametrize("fails", [False, True])
async def test_an_answer_that_has_come_is_written_before_its_batch_is_stopped(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    begun, may_end, written = asyncio.Event(), asyncio.Event(), []

    async def write() -> None:
        begun.set()
        await may_end.wait()
        if fails:
            raise OSError("disk full")
        written.append("answer")

    writing = asyncio.create_task(to_its_end(write()))
    await begun.wait()
    writing.cancel()
    await asyncio.wait((writing,), timeout=0.05)
    assert not writing.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert written == ([] if fails else ["answer"])
    assert ("an answer of a batch was not written: disk full" in caplog.text) == fails
