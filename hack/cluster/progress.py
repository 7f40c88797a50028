"""What a person sees while it works: one line a step, with the seconds it took."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, file=sys.stderr, flush=True)


def elapsed(seconds: float) -> str:
    """Return a time for people: 3.2 s, or 4 min 05 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what was done and how long it took; a failure says which step it was."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"failed: {text} ({elapsed(time.monotonic() - started)})")
        raise
    say(f"{text} ({elapsed(time.monotonic() - started)})")
