"""One batch from its input file to its end. What is written is never run again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, cast

from mizzen.runtime.gateway.batches.lines import (
    Checked,
    Line,
    LineAnswer,
    LineError,
    check_lines,
    line_error,
    parse_line,
    unanswered,
)
from mizzen.runtime.gateway.batches.records import Batch, Status, StoredFile, new_id
from mizzen.runtime.gateway.batches.shelf import Shelf, mend

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_READ_AHEAD = 64
Stop = Literal["cancelled", "expired", "failed", "draining"]


@dataclass(frozen=True, slots=True)
class Work:
    """What a batch needs of the gateway around it."""

    ask: Callable[[Batch, Line, str], Awaitable[LineAnswer | None]]
    parallel: int
    is_draining: Callable[[], bool]
    has_key: Callable[[str], bool]
    now_s: Callable[[], int]
    most_lines: int
    most_line_bytes: int
    keep_s: int


class Job:
    """Runs the lines of one batch that have no answer yet."""

    def __init__(self, shelf: Shelf, batch: Batch, work: Work) -> None:
        self._shelf = shelf
        self._work = work
        self.batch = batch
        self._done: set[str] = set()
        self._slots = asyncio.Semaphore(work.parallel)
        self._writing = asyncio.Lock()
        self._saved = batch
        self._stop: Stop | None = None

    async def run(self) -> None:
        """Go on with the batch; it has ended afterwards, unless this gateway is leaving.

        Raises:
            OSError: the volume fails; nothing of what is written is lost.
        """
        await asyncio.to_thread(self._take_up)
        if self.batch.status == "cancelling":
            self._stop = "cancelled"
        elif self.batch.status == "validating":
            await self._check()
        if self.batch.is_ended:
            return
        if self._stop is None:
            try:
                await self._run_lines()
            except LineError as error:
                self._fail(error)
        if self._stop != "draining":
            await asyncio.to_thread(self._end)

    def _take_up(self) -> None:
        output = mend(self._shelf.data(self.batch.output_id))
        errors = mend(self._shelf.data(self.batch.errors_id))
        self._done = output | errors
        self.batch = replace(self.batch, completed=len(output), failed=len(errors))

    def _fail(self, error: LineError) -> None:
        self._stop = "failed"
        self.batch = replace(self.batch, errors=(line_error(error, None),))

    async def _save(self) -> None:
        batch = self.batch
        await asyncio.to_thread(self._shelf.put_batch, batch)
        self._saved = batch

    # Before the first line.

    async def _check(self) -> None:
        checked = await asyncio.to_thread(self._checked)
        now_s = self._work.now_s()
        if checked.errors:
            self.batch = self.batch.moved("failed", now_s, errors=checked.errors)
        else:
            self.batch = self.batch.moved("in_progress", now_s, total=checked.total)
        await self._save()

    def _checked(self) -> Checked:
        try:
            with self._open_input() as lines:
                return check_lines(
                    lines,
                    endpoint=self.batch.endpoint,
                    most_lines=self._work.most_lines,
                    most_bytes=self._work.most_line_bytes,
                )
        except LineError as error:
            return Checked(0, (line_error(error, None),))

    def _open_input(self) -> IO[bytes]:
        try:
            return self._shelf.data(self.batch.input_file_id).open("rb")
        except FileNotFoundError:
            message = "The input file was deleted."
            raise LineError("input_file_missing", message, "input_file_id") from None

    # Its lines.

    async def _run_lines(self) -> None:
        lines = asyncio.create_task(self._all_lines(), name=f"lines of {self.batch.id}")
        try:
            while not lines.done():
                await asyncio.wait((lines,), timeout=_LOOK_S)
                await self._look()
                if self._stop in ("cancelled", "expired", "failed"):
                    lines.cancel()
                    await asyncio.wait((lines,))
            if not lines.cancelled():
                lines.result()
        finally:
            lines.cancel()
            await asyncio.wait((lines,))

    async def _look(self) -> None:
        """See whether it shall stop, and let others see how it goes."""
        asked = await asyncio.to_thread(self._shelf.batch, self.batch.id)
        if asked is not None and asked.status == "cancelling":
            self._stop = "cancelled"
            self.batch = replace(self.batch, times_s=asked.times_s)
        elif self._work.now_s() >= self.batch.expires_at_s:
            self._stop = "expired"
        elif not self._work.has_key(self.batch.owner):
            self._fail(LineError("key_removed", "The API key that made this batch was removed."))
        if self.batch != self._saved:
            await self._save()

    async def _all_lines(self) -> None:
        with await asyncio.to_thread(self._open_input) as file:
            async with asyncio.TaskGroup() as running:
                while found := await asyncio.to_thread(self._next_lines, file):
                    for line in found:
                        await self._slots.acquire()
                        if self._work.is_draining():
                            self._stop = "draining"
                            return
                        task = running.create_task(self._run_line(line))
                        task.add_done_callback(lambda _: self._slots.release())

    def _next_lines(self, file: IO[bytes]) -> list[Line]:
        """Return some of the lines that have no answer yet, none at the end of the file."""
        unanswered_lines = (
            line
            for text in file
            if text.strip()
            if (line := parse_line(text, endpoint=self.batch.endpoint)).custom_id not in self._done
        )
        return list(islice(unanswered_lines, _READ_AHEAD))

    async def _run_line(self, line: Line) -> None:
        request_id = new_id("req-")
        answer = await self._work.ask(self.batch, line, request_id)
        if answer is None:
            self._stop = "draining"
            return
        await to_its_end(self._keep(line, answer, request_id))
        self.batch = replace(
            self.batch,
            completed=self.batch.completed + answer.is_good,
            failed=self.batch.failed + (not answer.is_good),
        )

    async def _keep(self, line: Line, answer: LineAnswer, request_id: str) -> None:
        # One at a time: a long line is written in several pieces.
        async with self._writing:
            await asyncio.to_thread(self._write, line, answer, request_id)

    def _write(self, line: Line, answer: LineAnswer, request_id: str) -> None:
        name = self.batch.output_id if answer.is_good else self.batch.errors_id
        _append(self._shelf.data(name), [answer.written(line.custom_id, request_id)])

    # Its end.

    def _end(self) -> None:
        self._take_up()
        if self._stop == "expired":
            self._write_off()
            self._take_up()
        now_s = self._work.now_s()
        changes = {
            "has_output": self._publish(self.batch.output_id, "output", now_s),
            "has_errors": self._publish(self.batch.errors_id, "errors", now_s),
        }
        status: Status = "completed" if self._stop is None else cast(Status, self._stop)
        self.batch = self.batch.moved("finalizing", now_s).moved(status, now_s, **changes)
        self._shelf.put_batch(self.batch)

    def _write_off(self) -> None:
        """Say of every line without an answer that its time is over."""
        with suppress(LineError), self._open_input() as file:
            while lines := self._next_lines(file):
                written = [unanswered(line.custom_id) for line in lines]
                _append(self._shelf.data(self.batch.errors_id), written)

    def _publish(self, file_id: str, what: str, now_s: int) -> bool:
        """Make a file of answers known to its owner, if it has any."""
        path = self._shelf.data(file_id)
        if not path.exists():
            return False
        stored = StoredFile(
            id=file_id,
            filename=f"{self.batch.id}_{what}.jsonl",
            purpose="batch_output",
            size_bytes=path.stat().st_size,
            created_at_s=now_s,
            expires_at_s=now_s + self._work.keep_s,
        )
        self._shelf.put_file(stored)
        return True


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Do what must be done once it has begun; who is cancelled meanwhile goes only then."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        if (error := task.exception()) is not None:
            log.error("an answer of a batch was not written: %s", error)
        raise


def _append(path: Path, lines: list[bytes]) -> None:
    with path.open("ab") as file:
        file.writelines(lines)
