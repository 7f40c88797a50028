"""Freed memory goes back to the system. Must not import torch: the server's process has it too."""

import ctypes


class Rest:
    """Tells when an engine has rested for `beats` looks at it, once each time."""

    def __init__(self, beats: int) -> None:
        self._beats = beats
        self._steps = self._quiet_beats = 0

    def begins(self, steps: int, *, is_busy: bool) -> bool:
        """Return whether it now rests, after `steps` steps in all."""
        is_quiet = not is_busy and steps == self._steps
        self._steps, self._quiet_beats = steps, self._quiet_beats + 1 if is_quiet else 0
        return self._quiet_beats == self._beats


def give_back_freed() -> None:
    """Return freed memory to the system where the C library can.

    glibc keeps what lies between blocks in use. Packing a model's matrices one by one leaves many
    such gaps, and so do a tokenizer's reading and a step's intermediate results: they would stay as
    long as the process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
