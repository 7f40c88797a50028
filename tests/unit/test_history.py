"""Which revisions are remembered, and what going back to one makes of a spec."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.planning.history import Entry, next_history, restored_spec

ONE, TWO, THREE = Entry("one", 1), Entry("two", 2), Entry("three", 3)

# Kept so far, the current revision, what pods tell, whether it rests, limit: what should exist.
CASES: dict[str, tuple[list[Entry], str, list[str], bool, int, list[Entry]]] = {
    "a deployment that never changed has no history": ([], "one", ["one"], False, 10, []),
    "a new deployment has none either": ([], "one", [], False, 10, []),
    "one that goes to rest leaves word of what it was": ([], "one", ["one"], True, 10, [ONE]),
    "a second revision writes down both": ([], "two", ["one"], False, 10, [ONE, TWO]),
    "before its first pod and after": ([ONE, TWO], "two", ["one", "two"], False, 10, [ONE, TWO]),
    "a third one is added": ([ONE, TWO], "three", ["two"], False, 10, [ONE, TWO, THREE]),
    "going back makes the earlier one the newest": (
        [ONE, TWO], "one", ["two"], False, 10, [TWO, Entry("one", 3)],
    ),
    "two that overlap keep the order of their pods": (
        [], "three", ["one", "two"], False, 10, [ONE, TWO, THREE],
    ),
    "the oldest goes beyond the limit": ([ONE, TWO], "three", [], False, 1, [TWO, THREE]),
    "a limit of none keeps the current one": ([ONE, TWO], "two", [], False, 0, [TWO]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "current", "known", "rests", "limit", "expected"), CASES.values(), ids=CASES
)
def test_next_history(
    kept: list[Entry],
    current: str,
    known: list[str],
    rests: bool,
    limit: int,
    expected: list[Entry],
) -> None:
    found = next_history(kept, current=current, known=known, in_use=(), rests=rests, limit=limit)
    assert list(found) == expected


def test_a_revision_in_use_stays_whatever_the_limit() -> None:
    found = next_history(
        [ONE, TWO], current="three", known=(), in_use={"one"}, rests=False, limit=0
    )
    assert list(found) == [ONE, THREE]


revisions = st.sampled_from(["a", "b", "c", "d"])
histories = st.lists(revisions, unique=True).map(
    lambda names: [Entry(name, number) for number, name in enumerate(names, 1)]
)


@given(histories, revisions, st.lists(revisions, unique=True), st.booleans(), st.integers(0, 3))
def test_writing_the_history_leaves_nothing_to_write(
    kept: list[Entry], current: str, known: list[str], rests: bool, limit: int
) -> None:
    def again(entries: list[Entry]) -> list[Entry]:
        in_use = set(known)
        return list(
            next_history(
                entries, current=current, known=known, in_use=in_use, rests=rests, limit=limit
            )
        )

    once = again(kept)
    assert again(once) == once
    assert len({entry.number for entry in once}) == len(once)
    if once:
        assert once[-1].revision == current


def test_going_back_keeps_what_makes_no_revision() -> None:
    current = {"model": {"source": "file:///new"}, "replicas": 3, "engine": {"maxNumSeqs": 4}}
    past = {"model": {"source": "file:///old"}}
    kept = ("replicas", "scaling")
    assert restored_spec(current, past, kept=kept) == {
        "model": {"source": "file:///old"}, "replicas": 3,
    }  # fmt: skip
