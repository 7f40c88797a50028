"""Which requests belong together, which replica they go to, and which replicas are passed over."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.runtime.gateway.affinity import affinity_key
from mizzen.runtime.gateway.outliers import Outliers
from mizzen.runtime.gateway.placement import Load, choose_replica, most_in_flight
from tests.fixtures.clock import Clock

URLS = [f"http://10.0.0.{n}:8000" for n in range(4)]


def user(text: object) -> dict[str, object]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, object]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief. " * 400}

TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two turns of a conversation": (
        {"messages": [SYSTEM, user("hi")]},
        {"messages": [SYSTEM, user("hi"), answer("hello"), user("more")]},
    ),
    "text and the same text as parts": (
        {"messages": [user("hi")]},
        {"messages": [user([{"type": "text", "text": "hi"}])]},
    ),
    "two questions on one long document": (
        {"messages": [user("page " * 5000 + "What?")]},
        {"messages": [user("page " * 5000 + "Why?")]},
    ),
    "a bare prompt and what it grew into": (
        {"prompt": "Once upon a time " * 20},
        {"prompt": "Once upon a time " * 20 + "there was"},
    ),
    "a prompt and a list of it": ({"prompt": "Once"}, {"prompt": ["Once"]}),
    "different prompts under one cache key": (
        {"prompt_cache_key": "k", "prompt": "a"},
        {"prompt_cache_key": "k", "prompt": "b"},
    ),
}
APART: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two first messages": ({"messages": [user("a")]}, {"messages": [user("b")]}),
    "two long system prompts that differ at their end": (
        {"messages": [{"role": "system", "content": "x" * 20000 + "a"}, user("hi")]},
        {"messages": [{"role": "system", "content": "x" * 20000 + "b"}, user("hi")]},
    ),
    "two prompts": ({"prompt": "a"}, {"prompt": "b"}),
    "two prompts of tokens": ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
}
NOTHING: dict[str, dict[str, Any]] = {
    "no prompt": {},
    "no messages": {"messages": []},
    "an empty prompt": {"prompt": ""},
    "messages that are none": {"messages": [7]},
    "a prompt of another kind": {"prompt": {"id": "x"}},
}


@pytest.mark.parametrize(("one", "other"), TOGETHER.values(), ids=TOGETHER)
def test_these_belong_together(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert affinity_key(one, model="m") == affinity_key(other, model="m") is not None


@pytest.mark.parametrize(("one", "other"), APART.values(), ids=APART)
def test_these_do_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert affinity_key(one, model="m") != affinity_key(other, model="m")


@pytest.mark.parametrize("document", NOTHING.values(), ids=NOTHING)
def test_nothing_to_go_by(document: dict[str, Any]) -> None:
    assert affinity_key(document, model="m") is None


def test_an_adapter_and_its_base_share_no_cache_and_a_session_outranks_the_prompt() -> None:
    one, other = {"prompt": "a"}, {"prompt": "b"}
    assert affinity_key(one, model="m") != affinity_key(one, model="m:support")
    assert affinity_key(one, model="m", session="s") == affinity_key(other, model="m", session="s")


def test_every_process_gives_a_prompt_the_same_key() -> None:
    code = (
        "from mizzen.runtime.gateway.affinity import affinity_key;"
        "print(affinity_key({'prompt': 'Once'}, model='m'))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) == affinity_key({"prompt": "Once"}, model="m")


def place(key: int | None, counts: dict[str, int]) -> str:
    loads = [Load(url, in_flight) for url, in_flight in counts.items()]
    chosen = choose_replica(loads, key=key, load_factor=1.25)
    assert chosen is not None
    return chosen.url


def key_of(n: int) -> int:
    key = affinity_key({"prompt": f"prompt {n}"}, model="m")
    assert key is not None
    return key


keys = st.integers(0, 2**64 - 1)
counts = st.dictionaries(st.sampled_from(URLS), st.integers(0, 50), min_size=1)


@given(keys, counts)
def test_no_replica_is_given_more_than_its_bound(key: int, counts: dict[str, int]) -> None:
    chosen = place(key, counts)
    assert counts[chosen] + 1 <= most_in_flight(sum(counts.values()), len(counts), 1.25)


@given(keys, st.permutations(URLS))
def test_the_order_of_replicas_does_not_matter(key: int, urls: list[str]) -> None:
    assert place(key, dict.fromkeys(urls, 0)) == place(key, dict.fromkeys(URLS, 0))


@given(keys, st.sampled_from(URLS))
def test_a_replica_that_goes_moves_only_its_own_keys(key: int, gone: str) -> None:
    before = place(key, dict.fromkeys(URLS, 0))
    after = place(key, {url: 0 for url in URLS if url != gone})
    assert after == before or before == gone


def test_keys_spread_evenly_and_a_full_replicas_overflow_does_too() -> None:
    idle = Counter(place(key_of(n), dict.fromkeys(URLS, 0)) for n in range(4000))
    assert all(800 < idle[url] < 1200 for url in URLS)
    full = {**dict.fromkeys(URLS, 0), URLS[0]: 9}
    spilled: Counter[str] = Counter()
    for n in range(4000):
        key = key_of(n)
        if place(key, dict.fromkeys(URLS, 0)) == URLS[0]:
            spilled[place(key, full)] += 1
    assert spilled[URLS[0]] == 0
    assert all(spilled[url] > sum(spilled.values()) / 5 for url in URLS[1:])


def outliers(clock: Clock) -> Outliers:
    return Outliers(eject_s=5, max_share_ratio=0.5, clock=clock)


def test_half_of_the_replicas_stay_in_whatever_happens() -> None:
    clock = Clock()
    judge = outliers(clock)
    for n, url in enumerate(URLS):
        clock.now = n / 10
        judge.note_failure(url)
    # The first to fail come back first.
    assert judge.ejected(URLS) == set(URLS[2:])
    assert judge.ejected(URLS[:2]) == {URLS[1]}
    assert judge.ejected(URLS[:1]) == set()


def test_each_failure_in_a_row_keeps_a_replica_out_for_longer() -> None:
    clock = Clock()
    judge = outliers(clock)
    for out_s in (5, 10, 15):
        judge.note_failure(URLS[0])
        clock.now += out_s - 1
        assert judge.ejected(URLS)
        clock.now += 2
        assert not judge.ejected(URLS)
    judge.note_success(URLS[0])
    judge.note_failure(URLS[0])
    clock.now += 6
    assert not judge.ejected(URLS)


def test_errors_eject_only_in_a_row() -> None:
    judge = outliers(Clock())
    for _ in range(4):
        judge.note_error(URLS[0])
    judge.note_success(URLS[0])
    for _ in range(4):
        judge.note_error(URLS[0])
    assert not judge.ejected(URLS)
    judge.note_error(URLS[0])
    assert judge.ejected(URLS) == {URLS[0]}
