"""/v1/files and /v1/batches, as OpenAI's clients ask for them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import IO, TypeVar

from aiohttp import web

from mizzen.runtime.gateway.batches.errors import (
    BatchesOffError,
    NoSuchBatchError,
    NoSuchFileError,
    NotToCancelError,
    TooManyBatchesError,
    VolumeError,
)
from mizzen.runtime.gateway.batches.lines import ENDPOINTS
from mizzen.runtime.gateway.batches.records import Batch, StoredFile, new_id
from mizzen.runtime.gateway.batches.shelf import Shelf
from mizzen.runtime.gateway.batches.upload import Upload, allow_upload
from mizzen.runtime.gateway.body import read_document
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.connections import Connections
from mizzen.runtime.gateway.errors import BadBodyError

_WINDOW = re.compile(r"([1-9]\d{0,2})h")
_LONGEST_WINDOW_H = 168
_MOST_OPEN = 100
_MOST_METADATA = 16
_LIMIT_DIGITS = 9
_PIECE_BYTES = 256 * 1024
_BODY_BYTES = 2**20
_FIELDS = frozenset(("input_file_id", "endpoint", "completion_window", "metadata"))
_DAY_S = 86400

_Result = TypeVar("_Result")
_Record = TypeVar("_Record", StoredFile, Batch)


class BatchRoutes:
    """Handlers over the shelves of all owners."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        connections: Connections,
        owner_of: Callable[[web.Request], str],
        on_batch: Callable[[], None],
        now_s: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self._config = config
        self._connections = connections
        self._owner_of = owner_of
        self._on_batch = on_batch
        self._now_s = now_s

    def add_to(self, app: web.Application) -> None:
        """Make the paths known."""
        add = app.router
        add.add_post("/v1/files", self.upload, expect_handler=allow_upload)
        add.add_get("/v1/files", self.list_files)
        add.add_get("/v1/files/{file_id}", self.get_file)
        add.add_get("/v1/files/{file_id}/content", self.content)
        add.add_delete("/v1/files/{file_id}", self.delete_file)
        add.add_post("/v1/batches", self.create)
        add.add_get("/v1/batches", self.list_batches)
        add.add_get("/v1/batches/{batch_id}", self.get_batch)
        add.add_post("/v1/batches/{batch_id}/cancel", self.cancel)

    def _shelf(self, request: web.Request) -> Shelf:
        if self._config.batches_dir is None:
            raise BatchesOffError()
        return Shelf(self._config.batches_dir, self._owner_of(request))

    # Files.

    async def upload(self, request: web.Request) -> web.Response:
        """POST /v1/files."""
        shelf = self._shelf(request)
        file_id = new_id("file-")
        path = await _at_volume(shelf.data, file_id)
        upload = Upload(request, path, self._config)
        try:
            filename = await upload.receive()
            stored = StoredFile(
                id=file_id,
                filename=filename,
                purpose="batch",
                size_bytes=upload.size_bytes,
                created_at_s=self._now_s(),
                expires_at_s=self._now_s() + self._config.batches_keep_days * _DAY_S,
            )
            await _at_volume(shelf.put_file, stored)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return _json(stored.document())

    async def list_files(self, request: web.Request) -> web.Response:
        """GET /v1/files."""
        files = await _at_volume(self._shelf(request).files)
        if (purpose := request.query.get("purpose")) is not None:
            files = [stored for stored in files if stored.purpose == purpose]
        if request.query.get("order") == "asc":
            files.reverse()
        return _page(request, files, most=10000, usual=10000)

    async def get_file(self, request: web.Request) -> web.Response:
        """GET /v1/files/ID."""
        return _json((await self._file(request)).document())

    async def content(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/files/ID/content."""
        stored = await self._file(request)
        answer = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        answer.content_length = stored.size_bytes
        with await _at_volume(_open, self._shelf(request), stored.id) as file:
            await answer.prepare(request)
            while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
                with self._connections.writing(request):
                    await answer.write(piece)
            await answer.write_eof()
        return answer

    async def delete_file(self, request: web.Request) -> web.Response:
        """DELETE /v1/files/ID."""
        stored = await self._file(request)
        await _at_volume(self._shelf(request).delete_file, stored.id)
        return _json({"id": stored.id, "object": "file", "deleted": True})

    async def _file(self, request: web.Request) -> StoredFile:
        wanted = request.match_info["file_id"]
        stored = await _at_volume(self._shelf(request).file, wanted)
        if stored is None:
            raise NoSuchFileError(wanted)
        return stored

    # Batches.

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/batches."""
        shelf = self._shelf(request)
        document = await read_document(
            request, limit_bytes=_BODY_BYTES, timeout_s=self._config.body_timeout_s
        )
        batch = new_batch(document, owner=self._owner_of(request), now_s=self._now_s())
        if await _at_volume(shelf.file, batch.input_file_id) is None:
            raise NoSuchFileError(batch.input_file_id)
        open_batches = sum(not one.is_ended for one in await _at_volume(shelf.batches))
        if open_batches >= _MOST_OPEN:
            raise TooManyBatchesError(
                f"This API key has {open_batches} batches that have not ended; wait for one, or "
                "cancel one."
            )
        await _at_volume(shelf.put_batch, batch)
        self._on_batch()
        return _json(batch.document())

    async def list_batches(self, request: web.Request) -> web.Response:
        """GET /v1/batches."""
        batches = await _at_volume(self._shelf(request).batches)
        return _page(request, batches, most=100, usual=20)

    async def get_batch(self, request: web.Request) -> web.Response:
        """GET /v1/batches/ID."""
        return _json((await self._batch(request)).document())

    async def cancel(self, request: web.Request) -> web.Response:
        """POST /v1/batches/ID/cancel."""
        batch = await self._batch(request)
        if batch.is_ended:
            raise NotToCancelError(f"The batch {batch.id} has ended: it is {batch.status}.")
        told = await _at_volume(self._shelf(request).cancel, batch, self._now_s())
        return _json(told.document())

    async def _batch(self, request: web.Request) -> Batch:
        wanted = request.match_info["batch_id"]
        batch = await _at_volume(self._shelf(request).batch, wanted)
        if batch is None:
            raise NoSuchBatchError(wanted)
        return batch


def new_batch(document: dict[str, object], *, owner: str, now_s: int) -> Batch:
    """Return the batch that is asked for.

    Raises:
        BadBodyError: a field is missing, unknown or wrong; it is named.
    """
    if unknown := sorted(document.keys() - _FIELDS):
        raise BadBodyError(
            f"Unknown field {unknown[0]!r}; a batch has {', '.join(sorted(_FIELDS))}."
        )
    input_file_id, endpoint = document.get("input_file_id"), document.get("endpoint")
    if not isinstance(input_file_id, str):
        raise BadBodyError("Give 'input_file_id': the id of a file of purpose \"batch\".")
    if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
        raise BadBodyError(f"The field 'endpoint' must be one of {', '.join(ENDPOINTS)}.")
    window = document.get("completion_window")
    found = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    if not isinstance(window, str) or found is None or int(found[1]) > _LONGEST_WINDOW_H:
        raise BadBodyError(
            "The field 'completion_window' must be hours, from \"1h\" to "
            f'"{_LONGEST_WINDOW_H}h", such as "24h".'
        )
    return Batch(
        id=new_id("batch_"),
        owner=owner,
        endpoint=endpoint,
        input_file_id=input_file_id,
        completion_window=window,
        created_at_s=now_s,
        expires_at_s=now_s + int(found[1]) * 3600,
        metadata=_metadata(document.get("metadata")),
    )


def _metadata(given: object) -> dict[str, str] | None:
    if given is None:
        return None
    if (
        not isinstance(given, dict)
        or len(given) > _MOST_METADATA
        or not all(isinstance(value, str) and len(value) <= 512 for value in given.values())
    ):
        raise BadBodyError(
            f"The field 'metadata' must be at most {_MOST_METADATA} strings of up to 512 "
            "characters, by name."
        )
    return given


async def _at_volume(call: Callable[..., _Result], *arguments: object) -> _Result:
    """Do what may block or fail as volumes do.

    Raises:
        VolumeError: it failed.
    """
    try:
        return await asyncio.to_thread(call, *arguments)
    except OSError as error:
        raise VolumeError(error) from error


def _open(shelf: Shelf, file_id: str) -> IO[bytes]:
    return shelf.data(file_id).open("rb")


def _page(
    request: web.Request, records: Sequence[_Record], *, most: int, usual: int
) -> web.Response:
    given = request.query.get("limit", str(usual))
    # int() refuses thousands of digits in its own way.
    if not given.isdecimal() or len(given) > _LIMIT_DIGITS or not 1 <= int(given) <= most:
        raise BadBodyError(f"The parameter 'limit' must be a number from 1 to {most}.")
    after = request.query.get("after")
    ids = [record.id for record in records]
    if after is not None and after not in ids:
        raise BadBodyError("The parameter 'after' must be an id of this list.")
    rest = records if after is None else records[ids.index(after) + 1 :]
    shown = rest[: int(given)]
    return _json(
        {
            "object": "list",
            "data": [record.document() for record in shown],
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
            "has_more": len(shown) < len(rest),
        }
    )


def _json(document: object) -> web.Response:
    return web.Response(body=json.dumps(document).encode(), content_type="application/json")
