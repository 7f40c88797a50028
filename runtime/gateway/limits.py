"""What a key may use: requests and tokens per minute, requests at a time, and its priority.

Written beside the key as words, `requests-per-minute=60 tokens-per-minute=100000 concurrency=4
priority=1`. Every gateway counts by itself: what is counted is never shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

from mizzen.runtime.gateway.errors import RateLimitedError

_MOST = 10**12
_MOST_DIGITS = 13
# A client that is refused for its concurrency cannot know when its other requests end.
_CONCURRENCY_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one key; None is no bound. A higher priority is served first when all wait."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    priority: int = 0

    def __str__(self) -> str:
        values = ((_word(f.name), getattr(self, f.name), f.default) for f in fields(self))
        return " ".join(f"{name}={value}" for name, value, default in values if value != default)


def parse_limits(text: str) -> Limits:
    """Read limits from words of the form NAME=NUMBER.

    Raises:
        ValueError: a word is none of them; it is named with what is possible.
    """
    names = {_word(f.name): f.name for f in fields(Limits)}
    found: dict[str, int] = {}
    for word in text.replace(",", " ").split():
        name, _, number = word.partition("=")
        lowest, highest = (-100, 100) if name == "priority" else (1, _MOST)
        if name not in names or not number.removeprefix("-").isdecimal():
            raise ValueError(f"{word!r} is no limit; write NAME=NUMBER with {', '.join(names)}.")
        if len(number) > _MOST_DIGITS or not lowest <= int(number) <= highest:
            raise ValueError(
                f"{word!r} is out of range: write a number from {lowest} to {highest}."
            )
        found[names[name]] = int(number)
    return Limits(**found)


def _word(name: str) -> str:
    return name.replace("_", "-")


class Bucket:
    """A minute's allowance that refills steadily; it may go below zero when more was used."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def left(self, now: float) -> float:
        """What may be used now."""
        refilled = self._left + (now - self._at) * self.per_minute / 60
        self._left, self._at = min(float(self.per_minute), refilled), now
        return self._left

    def take(self, amount: float, now: float) -> None:
        """Use some, or give back a negative amount."""
        self._left = min(float(self.per_minute), self.left(now) - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Return how long until `amount` is there; a whole minute's allowance always comes."""
        missing = min(amount, self.per_minute) - self.left(now)
        return max(0.0, missing * 60 / self.per_minute)


@dataclass(slots=True)
class Account:
    """What one key has used."""

    limits: Limits
    clock: Callable[[], float]
    in_flight: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None

    def __post_init__(self) -> None:
        now = self.clock()
        if self.limits.requests_per_minute is not None:
            self.requests = Bucket(self.limits.requests_per_minute, now)
        if self.limits.tokens_per_minute is not None:
            self.tokens = Bucket(self.limits.tokens_per_minute, now)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request while the block runs.

        Raises:
            RateLimitedError: it is one too many.
        """
        most = self.limits.concurrency
        if most is not None and self.in_flight >= most:
            message = f"This API key has {most} requests open, which is its limit."
            raise RateLimitedError(message, "concurrency", _CONCURRENCY_RETRY_S)
        self._take(self.requests, 1, "requests")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def take_background(self, *, requests: int) -> None:
        """Count a request of a batch, which leaves half of every allowance to the key's others.

        `requests` is 1, or 0 for one that was counted and is asked again.

        Raises:
            RateLimitedError: no more than the half is left.
        """
        now = self.clock()
        wanted = ((self.requests, "requests", requests), (self.tokens, "tokens", 1))
        for bucket, what, amount in wanted:
            if bucket is None or amount == 0:
                continue
            # Of one request a minute there is no half: waiting for more than all ends with all.
            wait_s = bucket.wait_s(bucket.per_minute / 2 + amount, now)
            if wait_s > 0:
                message = f"Half of this API key's {bucket.per_minute} {what} per minute are used."
                raise RateLimitedError(message, what, wait_s)
        self._take(self.requests, requests, "requests")

    def charge_tokens(self, tokens: int) -> int:
        """Use what a request is expected to take; return it for `settle_tokens` to correct.

        A request that may take more than a minute's allowance takes the whole of it.

        Raises:
            RateLimitedError: that much is not there.
        """
        if self.tokens is None:
            return 0
        charged = min(tokens, self.tokens.per_minute)
        self._take(self.tokens, charged, "tokens")
        return charged

    def settle_tokens(self, *, charged: int, used: int) -> None:
        """Correct a charge by what the answer says was used."""
        if self.tokens is not None:
            self.tokens.take(used - charged, self.clock())

    def _take(self, bucket: Bucket | None, amount: int, what: str) -> None:
        if bucket is None:
            return
        now = self.clock()
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 0:
            message = f"This API key may use {bucket.per_minute} {what} per minute."
            raise RateLimitedError(message, what, wait_s)
        bucket.take(amount, now)

    def headers(self) -> Mapping[str, str]:
        """Return OpenAI's headers that say how much is left."""
        headers: dict[str, str] = {}
        now = self.clock()
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is None:
                continue
            headers[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.left(now))))
            full_s = bucket.wait_s(bucket.per_minute, now)
            headers[f"x-ratelimit-reset-{what}"] = _duration(full_s)
        return headers


class Accounts:
    """The accounts of all keys that have limits; a key whose limits change starts anew."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def of(self, client: str, limits: Limits) -> Account:
        """Return a key's account, opened at its first request."""
        account = self._accounts.get(client)
        if account is None or account.limits != limits:
            account = self._accounts[client] = Account(limits, self._clock)
        return account


def _duration(seconds: float) -> str:
    """Write a duration as OpenAI does: 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, left = divmod(seconds, 60)
    return f"{int(minutes)}m{left:.3g}s" if minutes else f"{left:.3g}s"
