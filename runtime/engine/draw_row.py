"""Draws one row's token on a CPU: the same draw as the sampler's batched one, without its sorting.

torch sorts a vocabulary of 50,000 in milliseconds a row; here nearly all of it is ruled out by one
comparison first.
"""

# Shapes: V vocabulary, C candidates kept of it, best first.
import numpy as np
from numpy.typing import NDArray

from mizzen.runtime.engine.api import SamplingParams

Floats = NDArray[np.float32] | NDArray[np.float64]


def draw_row(logits_V: NDArray[np.float32], params: SamplingParams, number: float) -> int:
    """Return the token at `number` (0 to 1) of the cumulative distribution that `params` leave."""
    scaled_V = (logits_V - logits_V.max()) / np.float32(params.temperature)
    weights_V = np.exp(scaled_V, out=scaled_V)  # the best token weighs 1
    if params.min_p:
        weights_V[weights_V < params.min_p] = 0
    vocab = len(weights_V)
    has_top_k = 0 < params.top_k < vocab
    if not has_top_k and params.top_p >= 1:
        return _invert(weights_V, number)
    mass = float(weights_V.sum(dtype=np.float64))
    if has_top_k:
        floor = np.partition(weights_V, vocab - params.top_k)[vocab - params.top_k]
    else:
        # All tokens below this weight hold less than `1 - top_p` together: none is needed.
        floor = np.float32((1 - params.top_p) * mass / vocab)
    ids_C = np.flatnonzero(weights_V >= floor)
    ids_C = ids_C[np.argsort(-weights_V[ids_C], kind="stable")]
    if has_top_k:
        ids_C = ids_C[: params.top_k]
        mass = float(weights_V[ids_C].sum(dtype=np.float64))
    kept_C = weights_V[ids_C].astype(np.float64)
    before_C = kept_C.cumsum() - kept_C
    count = max(1, int(np.searchsorted(before_C, params.top_p * mass)))
    return int(ids_C[_invert(kept_C[:count], number)])


def _invert(weights_C: Floats, number: float) -> int:
    """Return the first index whose cumulative share passes `number`."""
    sums_C = weights_C.cumsum(dtype=np.float64)
    # A rounded product may reach the total itself, beyond the last token of any weight.
    target = min(number * sums_C[-1], np.nextafter(sums_C[-1], 0))
    return int(np.searchsorted(sums_C, target, side="right"))
