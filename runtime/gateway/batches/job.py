"""One batch from its input file to its end. What is written is never run again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Literal, cast

from mizzen.runtime.gateway.batches.lines import (
    Checked,
    Line,
    LineAnswer,
    LineError,
    check_lines,
    line_error,
    parse_line,
    unanswered,
    written_ids,
)
from mizzen.runtime.gateway.batches.records import Batch, Status, StoredFile, new_id
from mizzen.runtime.gateway.batches.shelf import Shelf, mend

_LOOK_S = 1.0
_READ_AHEAD = 64
Stop = Literal["cancelled", "expired", "failed", "draining"]


@dataclass(frozen=True, slots=True)
class Work:
    """What a batch needs of the gateway around it."""

    ask: Callable[[Batch, Line, str], Awaitable[LineAnswer | None]]
    slots: asyncio.Semaphore
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
            await self._run_lines()
        if self._stop != "draining":
            await asyncio.to_thread(self._end)

    def _take_up(self) -> None:
        output = mend(self._shelf.data(self.batch.output_id))
        errors = mend(self._shelf.data(self.batch.errors_id))
        self._done = written_ids([*output, *errors])
        self.batch = replace(self.batch, completed=len(output), failed=len(errors))

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
            with self._input().open("rb") as lines:
                return check_lines(
                    lines,
                    endpoint=self.batch.endpoint,
                    most_lines=self._work.most_lines,
                    most_bytes=self._work.most_line_bytes,
                )
        except FileNotFoundError:
            why = LineError("input_file_missing", "The input file was deleted.", "input_file_id")
            return Checked(0, (line_error(why, None),))

    def _input(self) -> Path:
        return self._shelf.data(self.batch.input_file_id)

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
            self._stop = "failed"
            why = LineError("key_removed", "The API key that made this batch was removed.")
            self.batch = replace(self.batch, errors=(line_error(why, None),))
        if self.batch != self._saved:
            await self._save()

    async def _all_lines(self) -> None:
        with self._input().open("rb") as file:
            async with asyncio.TaskGroup() as running:
                while found := await asyncio.to_thread(self._next_lines, file):
                    for line in found:
                        await self._work.slots.acquire()
                        if self._work.is_draining():
                            self._work.slots.release()
                            self._stop = "draining"
                            return
                        task = running.create_task(self._run_line(line))
                        task.add_done_callback(lambda _: self._work.slots.release())

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
        # Not in a thread: between the answer and its line nothing can come.
        name = self.batch.output_id if answer.is_good else self.batch.errors_id
        _append(self._shelf.data(name), [answer.written(line.custom_id, request_id)])
        self.batch = replace(
            self.batch,
            completed=self.batch.completed + answer.is_good,
            failed=self.batch.failed + (not answer.is_good),
        )

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
        with suppress(FileNotFoundError), self._input().open("rb") as file:
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


def _append(path: Path, lines: list[bytes]) -> None:
    with path.open("ab") as file:
        file.writelines(lines)
