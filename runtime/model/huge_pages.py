"""Memory for weights in pages of 2 MiB, where the system has them.

A decode step reads every weight once. In pages of 4 KiB that is an address to look up for each, far
more than a processor remembers.
"""

import mmap
import threading
import weakref
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

PAGE = 2 << 20
_PIECE = 32 * PAGE
_LINE = 64


class HugePages:
    """Hands out tensors that lie side by side: most matrices are smaller than such a page.

    A piece of memory is given back with the last tensor in it. Pages that nothing was written to
    take none, so that pieces may be large: what is lost is the rest of one page at the end of each.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._piece: weakref.ref[mmap.mmap] | None = None
        self._free_from = 0

    def empty(self, sides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU whose numbers are not set."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(sides, dtype=dtype)
        count = prod(sides) * dtype.itemsize
        with self._lock:
            piece = None if self._piece is None else self._piece()
            if piece is None or self._free_from + count > len(piece):
                piece = self._begin_piece(count)
            start = self._free_from
            self._free_from = -(-(start + count) // _LINE) * _LINE
        whole = torch.frombuffer(piece, dtype=torch.uint8)  # which keeps the piece
        return whole[start : start + count].view(dtype).view(sides)

    def begin_anew(self) -> None:
        """Put what comes into a piece of its own: what was there may go while that stays."""
        with self._lock:
            self._piece = None

    def _begin_piece(self, count: int) -> mmap.mmap:
        size = max(_PIECE, -(-count // PAGE) * PAGE)
        # Older kernels do not begin a mapping where such a page may begin.
        piece = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that was built without them
            piece.madvise(mmap.MADV_HUGEPAGE)
        self._piece = weakref.ref(piece)
        self._free_from = -torch.frombuffer(piece, dtype=torch.uint8).data_ptr() % PAGE
        return piece


WEIGHT_PAGES = HugePages()
