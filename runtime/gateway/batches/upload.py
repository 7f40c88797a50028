"""A file on its way from a client to the volume, never whole in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from aiohttp import BodyPartReader, ClientPayloadError, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from mizzen.runtime.gateway.batches.errors import BadUploadError, FileTooLargeError, VolumeError
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.errors import SlowBodyError

_PIECE_BYTES = 256 * 1024
_FIELD_BYTES = 256
_LONGEST_S = 600.0
_BROKEN = (ClientPayloadError, HttpProcessingError, web.RequestPayloadError, ValueError)
_Read = TypeVar("_Read")


async def allow_upload(request: web.Request) -> None:
    """Answer `Expect: 100-continue`."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # The library counts what was written to tell whether an answer has begun.
    request.writer.output_size = 0


class Upload:
    """One form with the fields `file` and `purpose`, in any order."""

    def __init__(self, request: web.Request, path: Path, config: GatewayConfig) -> None:
        self._request = request
        self._path = path
        self._max_mib = config.batches_max_file_mib
        self._silence_s = config.body_timeout_s
        self._filename: str | None = None
        self._purpose: str | None = None
        self.size_bytes = 0

    async def receive(self) -> str:
        """Write the file; return the name the client has for it.

        Raises:
            BadUploadError, FileTooLargeError, SlowBodyError, VolumeError: with what is wrong.
        """
        if not self._request.content_type.startswith("multipart/"):
            raise BadUploadError(
                "Send the file as multipart/form-data, with the fields 'file' and 'purpose'."
            )
        try:
            async with asyncio.timeout(_LONGEST_S):
                await self._read_parts(await self._request.multipart())
        except TimeoutError:
            message = f"The file did not arrive: {self._silence_s:g} seconds without a byte, or "
            raise SlowBodyError(f"{message}{_LONGEST_S:g} in all.") from None
        except OSError as error:
            raise VolumeError(error) from error
        except _BROKEN as error:
            raise BadUploadError(f"The form is broken: {error}") from None
        if self._filename is None:
            raise BadUploadError("The form has no field 'file' with a file name.")
        if self._purpose != "batch":
            raise BadUploadError("The field 'purpose' must be \"batch\".")
        return self._filename

    async def _read_parts(self, form: MultipartReader) -> None:
        while (part := await self._in_time(form.next())) is not None:
            if not isinstance(part, BodyPartReader) or part.name not in ("file", "purpose"):
                raise BadUploadError("Unknown field; a file has the fields 'file' and 'purpose'.")
            if part.name == "file":
                await self._read_file(part)
            else:
                text = await self._in_time(part.read_chunk(_FIELD_BYTES))
                self._purpose = text.decode(errors="replace")
                await self._in_time(part.release())

    async def _read_file(self, part: BodyPartReader) -> None:
        if part.filename is None or self._filename is not None:
            raise BadUploadError("The form must have one field 'file', with a file name.")
        self._filename = part.filename[:255]
        with await asyncio.to_thread(self._path.open, "wb") as file:
            while piece := await self._in_time(part.read_chunk(_PIECE_BYTES)):
                self.size_bytes += len(piece)
                if self.size_bytes > self._max_mib * 2**20:
                    raise FileTooLargeError(self._max_mib)
                await asyncio.to_thread(file.write, piece)

    async def _in_time(self, reading: Awaitable[_Read]) -> _Read:
        async with asyncio.timeout(self._silence_s):
            return await reading
