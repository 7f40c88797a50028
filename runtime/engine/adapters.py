"""Which adapter name means which slot. A slot is emptied when nobody uses it any more.

New weights under an old name get a new slot, so that running sequences finish on what they began
with. Knows no tensor.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mizzen.runtime.engine.api import AdapterState
from mizzen.runtime.engine.errors import AdapterLoadError, UnknownAdapterError
from mizzen.runtime.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class SlotUse:
    """A filled slot and how many sequences use it."""

    slot: int
    content: str  # hash of the adapter's files: part of the prefix cache's key
    state: AdapterState
    users: int = 0
    retired: bool = False


class AdapterTable:
    """Names to slots. Not thread-safe: its owner locks."""

    def __init__(self, *, max_loras: int) -> None:
        self.max_loras = max_loras
        self._by_name: dict[str, SlotUse] = {}
        self._last_slot = 0

    def states(self) -> list[AdapterState]:
        """Return what can be asked for, by name."""
        return [self._by_name[name].state for name in sorted(self._by_name)]

    def has_content(self, name: str, content: str) -> bool:
        """Whether `name` already means these very weights."""
        use = self._by_name.get(name)
        return use is not None and use.content == content

    def reserve(self, name: str) -> int:
        """Return a slot number never used before.

        Raises:
            AdapterLoadError: as many adapters are loaded as may be.
        """
        if name not in self._by_name and len(self._by_name) >= self.max_loras:
            loaded = ", ".join(sorted(self._by_name)) or "none"
            raise AdapterLoadError(
                f"{self.max_loras} adapters may be loaded, and these are: {loaded}. Unload one, "
                "or raise --max-loras."
            )
        self._last_slot += 1
        return self._last_slot

    def publish(self, use: SlotUse) -> int | None:
        """Let new requests find it; return the slot to clear if it replaced an idle one."""
        replaced = self._by_name.get(use.state.name)
        self._by_name[use.state.name] = use
        return self._retire(replaced) if replaced else None

    def withdraw(self, name: str) -> int | None:
        """Hide an adapter from new requests; return its slot if nobody uses it.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        if name not in self._by_name:
            raise UnknownAdapterError(name, list(self._by_name))
        return self._retire(self._by_name.pop(name))

    def acquire(self, name: str) -> SlotUse:
        """Use an adapter for one sequence.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        use = self._by_name.get(name)
        if use is None:
            raise UnknownAdapterError(name, list(self._by_name))
        use.users += 1
        return use

    def release(self, use: SlotUse) -> int | None:
        """End one use; return the slot to clear if it was the last of a retired adapter."""
        use.users -= 1
        return use.slot if use.retired and use.users == 0 else None

    def _retire(self, use: SlotUse) -> int | None:
        use.retired = True
        return use.slot if use.users == 0 else None


def content_hash(directory: Path) -> str:
    """Return a hash of an adapter's files, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("adapter_*")):
        content = file.read_bytes()
        digest.update(f"{file.name}:{len(content)}:".encode())
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def names_of(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """Return the adapters that sequences use, each once, by name."""
    return tuple(sorted({seq.adapter for seq in sequences if seq.adapter}))
