"""Sends what `requests` and `messages` make, and hands every answer to the tally. Loopback only."""

from __future__ import annotations

import socket
from random import Random

import grpc  # type: ignore[import-untyped]
import httpx
from tritonclient.grpc import service_pb2 as pb

from hack.fuzz.messages import GrpcCall, odd_call
from hack.fuzz.requests import odd_http, odd_inference, odd_openai
from hack.fuzz.tally import FAILED, Tally

TIMEOUT_S = 60.0
_STREAM = {True: "stream", False: "call"}


class HttpSender:
    """Requests that are well framed, over kept connections."""

    def __init__(self, url: str, tally: Tally, rng: Random, *, part: str, infers: bool) -> None:
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT_S, verify=False, trust_env=False)
        self._tally = tally
        self._rng = rng
        self._part = part
        self._makes = (odd_openai, odd_inference) if infers else (odd_openai,)

    def send(self) -> None:
        """Send one."""
        request = self._rng.choice(self._makes)(self._rng)
        try:
            answer = self._client.request(
                request.method, request.path, headers=list(request.headers), content=request.body
            )
        except httpx.HTTPError as error:
            self._tally.find(self._part, f"{request.label}: {error!r}", request.body)
            return
        self._tally.http(self._part, request.label, answer, request.body)
        if b'"internal_error"' in answer.content or FAILED.encode() in answer.content:
            self._tally.find(self._part, f"{request.label}: fails in its stream", request.body)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class SocketSender:
    """Bytes that may not even be HTTP; an answer is not owed to them, a 5xx is not either."""

    def __init__(self, address: tuple[str, int], tally: Tally, rng: Random, *, part: str) -> None:
        self._address = address
        self._tally = tally
        self._rng = rng
        self._part = part

    def send(self) -> None:
        """Send one."""
        sent = odd_http(self._rng, "localhost")
        line = b""
        try:
            with socket.create_connection(self._address, timeout=TIMEOUT_S) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                line = connection.recv(4096).partition(b"\r\n")[0]
        except TimeoutError:
            self._tally.find(self._part, "no answer and no end", sent)
            return
        except OSError:
            pass  # closed on us: that is an answer too
        status = line[9:12].decode("latin-1")
        if status.startswith("5") and status != "503":
            self._tally.find(self._part, line.decode("latin-1"), sent)
        else:
            self._tally.count(self._part, status or "closed")

    def close(self) -> None:
        """Nothing is kept."""


class GrpcSender:
    """Messages as bytes: nothing checks them on this side."""

    def __init__(self, address: str, tally: Tally, rng: Random) -> None:
        self._channel = grpc.insecure_channel(address)
        self._tally = tally
        self._rng = rng

    def send(self) -> None:
        """Send one call."""
        call = odd_call(self._rng)
        try:
            replies = self._call(call)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
            self._tally.grpc("gRPC", call.method, code, details, b"|".join(call.messages))
            return
        self._tally.count("gRPC", f"OK {_STREAM[call.is_stream]}")
        for reply in replies:
            message = pb.ModelStreamInferResponse.FromString(reply).error_message
            if FAILED in message:
                self._tally.find("gRPC", f"{call.method}: {message}", b"|".join(call.messages))

    def _call(self, call: GrpcCall) -> list[bytes]:
        if call.is_stream:
            method = self._channel.stream_stream(call.method)
            return list(method(iter(call.messages), timeout=TIMEOUT_S))
        self._channel.unary_unary(call.method)(call.messages[0], timeout=TIMEOUT_S)
        return []

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


Sender = HttpSender | SocketSender | GrpcSender
