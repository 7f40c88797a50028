"""Which samples a step sees, and how they lie side by side in one packed row.

The order is a function of the seed and of one counter, the samples seen so far: a resumed job
continues with the sample it would have seen next, at any world size.
"""

# Shapes: T packed tokens, S segments (samples), N scored positions, E samples of an epoch.
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.samples import Item, Sample


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Samples laid end to end. Attention must not cross a segment's border."""

    token_ids_T: Tensor
    positions_T: Tensor  # restart at 0 in each segment
    lengths: tuple[int, ...]
    source_N: Tensor  # where the hidden state stands that predicts target_N
    target_N: Tensor
    label_counts: tuple[int, ...]  # of each segment: the first ones of N are the first segment's

    @property
    def labels(self) -> int:
        """Number of scored tokens."""
        return len(self.target_N)


def pack(samples: Sequence[Sample], device: torch.device) -> PackedBatch:
    """Lay samples end to end and list what is to be predicted from where."""
    token_ids_T = np.concatenate([sample.token_ids_T for sample in samples])
    positions_T = np.concatenate([np.arange(len(sample)) for sample in samples])
    is_label_T = np.concatenate([sample.is_label_T for sample in samples])
    # A segment's first token is never a label, so the place before a label is its own segment.
    labels_N = np.flatnonzero(is_label_T)
    return PackedBatch(
        token_ids_T=torch.from_numpy(token_ids_T.astype(np.int64)).to(device),
        positions_T=torch.from_numpy(positions_T).to(device),
        lengths=tuple(len(sample) for sample in samples),
        source_N=torch.from_numpy(labels_N - 1).to(device),
        target_N=torch.from_numpy(token_ids_T[labels_N].astype(np.int64)).to(device),
        label_counts=tuple(sample.labels for sample in samples),
    )


def sum_by_sample(batch: PackedBatch, values_N: Tensor) -> Tensor:
    """Return the sum of each sample's values, one for each scored token, differentiable."""
    return torch.stack([part.sum() for part in values_N.split(list(batch.label_counts))])


class SampleOrder:
    """The endless row of samples a job sees, epoch after epoch."""

    def __init__(self, data: Prepared, *, seed: int) -> None:
        self._data = data
        self._seed = seed
        self._shares = [
            round(len(samples) * weight)
            for samples, weight in zip(data.train, data.weights, strict=True)
        ]
        self.epoch_samples = max(1, sum(self._shares))
        self._epoch = -1
        self._epoch_order_E2 = np.empty((0, 2), np.int64)

    def take(self, counter: int, count: int) -> list[Item]:
        """Return `count` samples, from the one at `counter` on."""
        return [self._at(counter + offset) for offset in range(count)]

    def _at(self, counter: int) -> Item:
        epoch, place = divmod(counter, self.epoch_samples)
        if epoch != self._epoch:
            self._epoch, self._epoch_order_E2 = epoch, self._shuffled(epoch)
        dataset, index = self._epoch_order_E2[place].tolist()
        return self._data.train[dataset][index]

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return order_E2: dataset and index of each sample of an epoch."""
        # RandomState's stream is frozen by numpy's compatibility policy; Generator's is not, and
        # a job may be resumed by a newer image.
        random = np.random.RandomState([self._seed, epoch])
        parts = []
        for dataset, share in enumerate(self._shares):
            indices = self._repeated(len(self._data.train[dataset]), share, random)
            parts.append(np.stack([np.full_like(indices, dataset), indices], axis=1))
        entries_E2 = np.concatenate(parts)
        if not len(entries_E2):  # weights so small that every share rounds to nothing
            entries_E2 = np.zeros((1, 2), np.int64)
        return entries_E2[random.permutation(len(entries_E2))]

    @staticmethod
    def _repeated(size: int, share: int, random: np.random.RandomState) -> npt.NDArray[np.int64]:
        """Return `share` indices below `size`: whole rounds, then a random part of one more."""
        rounds, rest = divmod(share, size)
        whole = np.tile(np.arange(size), rounds)
        return np.concatenate([whole, random.permutation(size)[:rest]]).astype(np.int64)


def total_steps(
    *, epoch_samples: int, epochs: float, batch_size: int, max_steps: int | None
) -> int:
    """Return how many optimizer steps a job makes; `max_steps` overrules `epochs`."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(epoch_samples * epochs / batch_size))
