"""What the operator knows of the cluster, kept fresh by events, writes and relists.

The newest resourceVersion of an object wins, whoever brings it. A relist puts right what events
missed and names the owners to look at again. Reading it costs no request, and it may be a moment
old: before deleting anything, the caller asks the API server. Must not know what an owner is.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TypeVar

from mizzen.operator.engine.key import Key
from mizzen.operator.kube.documents import Json, Ref, version_of
from mizzen.operator.kube.trim import trim

# Which keys an object concerns: its owner, and whoever else must look when it changes.
Route = Callable[[Json], Iterable[Key]]
K = TypeVar("K")
# The values an object can be looked up by.
Index = Callable[[Json], Iterable[str]]


class Store:
    """Objects by name, by owner and by index."""

    def __init__(
        self, route: Route, *, indexes: Mapping[tuple[str, str], Index] | None = None
    ) -> None:
        self._route = route
        self._indexes = indexes or {}
        self._objects: dict[Ref, Json] = {}
        self._by_kind: dict[str, dict[Ref, Json]] = defaultdict(dict)
        self._routes: dict[Ref, tuple[Key, ...]] = {}
        self._by_owner: dict[tuple[Key, str], set[Ref]] = defaultdict(set)
        self._by_index: dict[tuple[str, str, str, str], set[Ref]] = defaultdict(set)
        # Versions at which objects were deleted: a late event must not bring them back.
        self._deleted: dict[Ref, int] = {}

    def get(self, ref: tuple[str, str, str, str], /) -> Json | None:
        """Return the object, or None where none is known."""
        return self._objects.get(Ref(*ref))

    def children(self, owner: Key, kind: str) -> list[Json]:
        """Return the owner's objects of this kind, sorted by name."""
        refs = self._by_owner.get((owner, kind), ())
        return [self._objects[ref] for ref in sorted(refs)]

    def lookup(self, kind: str, index: str, namespace: str, value: str) -> list[Json]:
        """Return the namespace's objects with this index value, sorted by name."""
        refs = self._by_index.get((kind, index, namespace, value), ())
        return [self._objects[ref] for ref in sorted(refs)]

    def all(self, kind: str) -> list[Json]:
        """Return every object of this kind."""
        return list(self._by_kind.get(kind, {}).values())

    def __len__(self) -> int:
        return len(self._objects)

    def put(self, document: Json) -> set[Key]:
        """Take in an object as just seen; return the keys it concerns, none if it is no news."""
        ref = Ref.of(document)
        version = version_of(document)
        if version <= self._deleted.get(ref, -1):
            return set()
        known = self._objects.get(ref)
        if known is not None and version <= version_of(known):
            return set()
        fresh = trim(document)
        before = self._routes.get(ref, ())
        self._forget(ref)
        self._deleted.pop(ref, None)
        self._remember(ref, fresh)
        if known is not None and _is_same(known, fresh):
            return set()
        return {*before, *self._routes[ref]}

    def remove(self, document: Json) -> set[Key]:
        """Take in that this object was deleted; return the keys that concerns."""
        ref = Ref.of(document)
        version = version_of(document)
        known = self._objects.get(ref)
        if known is not None and version < version_of(known):
            return set()
        self._deleted[ref] = max(version, self._deleted.get(ref, -1))
        concerned = set(self._routes.get(ref, ()))
        self._forget(ref)
        return concerned

    def forget(self, ref: Ref) -> None:
        """Drop an object that nobody watches, so that the next reader asks for it."""
        self._forget(ref)

    def prune(
        self, kind: str, present: Set[Ref], *, version: int, namespace: str | None = None
    ) -> set[Key]:
        """Drop what a full list as of `version` does not have; return the keys that concerns."""
        concerned: set[Key] = set()

        def is_listed(ref: Ref) -> bool:
            return ref.kind == kind and namespace in (None, ref.namespace)

        known = self._by_kind.get(kind, {})
        for ref in [ref for ref in known if is_listed(ref) and ref not in present]:
            # Newer than the list: an event or a write of ours was quicker.
            if version_of(self._objects[ref]) > version:
                continue
            concerned.update(self._routes.get(ref, ()))
            self._deleted[ref] = version
            self._forget(ref)
        # Watches have long passed the deletions before this list: no event brings them back.
        for ref in [r for r, at in self._deleted.items() if is_listed(r) and at < version]:
            del self._deleted[ref]
        return concerned

    def drop_except(self, kinds: Set[str]) -> None:
        """Forget objects of other kinds: nobody watches those, so they are read again."""
        for ref in [ref for ref in self._objects if ref.kind not in kinds]:
            self._forget(ref)

    def _remember(self, ref: Ref, document: Json) -> None:
        self._objects[ref] = document
        self._by_kind[ref.kind][ref] = document
        keys = tuple(self._route(document))
        self._routes[ref] = keys
        for key in keys:
            self._by_owner[key, ref.kind].add(ref)
        for (kind, name), index in self._indexes.items():
            if kind == ref.kind:
                for value in index(document):
                    self._by_index[kind, name, ref.namespace, value].add(ref)

    def _forget(self, ref: Ref) -> None:
        document = self._objects.pop(ref, None)
        if document is None:
            return
        del self._by_kind[ref.kind][ref]
        for key in self._routes.pop(ref, ()):
            _discard(self._by_owner, (key, ref.kind), ref)
        for (kind, name), index in self._indexes.items():
            if kind == ref.kind:
                for value in index(document):
                    _discard(self._by_index, (kind, name, ref.namespace, value), ref)


def _is_same(known: Json, fresh: Json) -> bool:
    """Return whether nothing differs but the version."""
    return all(
        known.get(key) == fresh.get(key) for key in (known.keys() | fresh.keys()) - {"metadata"}
    ) and _without_version(known["metadata"]) == _without_version(fresh["metadata"])


def _without_version(metadata: Json) -> Json:
    return {key: value for key, value in metadata.items() if key != "resourceVersion"}


def _discard(sets: dict[K, set[Ref]], key: K, ref: Ref) -> None:
    """Take `ref` out, and the set with its last element: a key must leave no trace."""
    members = sets.get(key)
    if members is not None:
        members.discard(ref)
        if not members:
            del sets[key]
