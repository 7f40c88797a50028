"""What rank 0 tells the other ranks, as bytes. Only integers and text: nothing is unpickled."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mizzen.runtime.engine.batch import StepInput

STEP, ALLOCATE, LOAD, CLEAR, SCRUB, PREPARE, FORGO, SWAP, RELEASE, LEND = range(10)
HEADER_INTS = 10
WORD = np.dtype(np.int64)


@dataclass(frozen=True, slots=True)
class Allocate:
    """Make a KV cache: of so many blocks, or as few as the rank with the least room has."""

    room: int


@dataclass(frozen=True, slots=True)
class Load:
    """Read an adapter and put it into a slot."""

    slot: int
    path: Path


@dataclass(frozen=True, slots=True)
class Clear:
    """Empty a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Scrub:
    """Make every number in these KV blocks finite."""

    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Prepare:
    """Read the weights at this path, beside what is computed."""

    path: Path


@dataclass(frozen=True, slots=True)
class Forgo:
    """Let go of the weights that were prepared; they will not be used."""


@dataclass(frozen=True, slots=True)
class Swap:
    """Compute with the prepared weights from now on."""


@dataclass(frozen=True, slots=True)
class Release:
    """Give back the memory of weights and KV cache."""


@dataclass(frozen=True, slots=True)
class Lend:
    """Begin this rank's part of a loan, beside what is computed."""

    job: str  # a job.json
    store: Path  # where the ranks meet for it
    step_tokens: int  # of the replica's own largest step


Message = StepInput | Allocate | Load | Clear | Scrub | Prepare | Forgo | Swap | Release | Lend


def encode(message: Message) -> bytes:
    """Return the message's bytes: ten integers that say what follows, then that."""
    match message:
        case StepInput():
            return _encode_step(message)
        case Allocate(room):
            return _header(ALLOCATE, room)
        case Load(slot, path):
            return _header(LOAD, slot) + str(path).encode()
        case Clear(slot):
            return _header(CLEAR, slot)
        case Scrub(blocks):
            return _header(SCRUB) + np.array(blocks, dtype=WORD).tobytes()
        case Prepare(path):
            return _header(PREPARE) + str(path).encode()
        case Forgo():
            return _header(FORGO)
        case Swap():
            return _header(SWAP)
        case Release():
            return _header(RELEASE)
        case Lend(job, store, step_tokens):
            path = str(store).encode()
            return _header(LEND, step_tokens, len(path)) + path + job.encode()


def decode(data: bytes) -> Message:
    """Return what `encode` was given."""
    kind, *sizes = np.frombuffer(data, dtype=WORD, count=HEADER_INTS).tolist()
    body = memoryview(data)[HEADER_INTS * WORD.itemsize :]
    if kind == STEP:
        return _decode_step(sizes, np.frombuffer(body, dtype=WORD).copy())
    if kind == SCRUB:
        return Scrub(np.frombuffer(body, dtype=WORD).tolist())
    if kind == LEND:
        step_tokens, length = sizes[:2]
        store = Path(bytes(body[:length]).decode())
        return Lend(bytes(body[length:]).decode(), store, step_tokens)
    path = Path(bytes(body).decode())
    plain: dict[int, Message] = {
        ALLOCATE: Allocate(sizes[0]),
        LOAD: Load(sizes[0], path),
        CLEAR: Clear(sizes[0]),
        PREPARE: Prepare(path),
        FORGO: Forgo(),
        SWAP: Swap(),
        RELEASE: Release(),
    }
    return plain[kind]


def _encode_step(step: StepInput) -> bytes:
    arrays = [
        step.token_ids_T,
        step.positions_T,
        step.slots_T,
        np.array(step.query_lens, dtype=WORD),
        np.array(step.context_lens, dtype=WORD),
        step.block_tables_SB.ravel(),
        step.sample_at_N,
        np.array(step.lora_slots_S, dtype=WORD),
    ]
    sizes = [len(array) for array in arrays]
    return _header(STEP, *sizes) + np.concatenate(arrays).tobytes()


def _decode_step(sizes: list[int], words: np.ndarray) -> StepInput:
    parts = np.split(words, np.cumsum(sizes[:7]))
    query_lens = parts[3].tolist()
    return StepInput(
        token_ids_T=parts[0],
        positions_T=parts[1],
        slots_T=parts[2],
        query_lens=query_lens,
        context_lens=parts[4].tolist(),
        block_tables_SB=parts[5].reshape(len(query_lens), -1),
        sample_at_N=parts[6],
        lora_slots_S=parts[7].tolist(),
    )


def _header(kind: int, *values: int) -> bytes:
    padding = [0] * (HEADER_INTS - 1 - len(values))
    return np.array([kind, *values, *padding], dtype=WORD).tobytes()
