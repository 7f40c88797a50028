"""A text's embedding: one vector made of its tokens' hidden states."""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-untyped-call"

# Shapes: T packed tokens, S sequences, D model width.
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "last"]


def pool(hidden_TD: Tensor, lens: Sequence[int], kind: Pooling) -> Tensor:
    """Return vectors_SD in float32, not normalised: each sequence's mean, or its last token's.

    Args:
        hidden_TD: What the decoder returned for whole sequences, one after the other.
        lens: Their lengths, none of them zero.
        kind: "last" suits most decoders, for only the last token has seen the whole text.
    """
    parts = hidden_TD.float().split(list(lens))
    return torch.stack([part.mean(0) if kind == "mean" else part[-1] for part in parts])
