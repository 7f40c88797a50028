"""Our samples as the Trainer takes them: one long row of all steps, and padded batches.

The order is ours, a function of the number of samples seen, so that a resumed job goes on with the
sample it would have seen next.
"""

# Shapes: B samples at once, T tokens of the longest, N scored positions, V vocabulary.
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mizzen.runtime.train.batches import SampleOrder
from mizzen.runtime.train.samples import Sample

IGNORED = -100  # the label of a token nobody has to predict


class OrderedSamples(Dataset[Sample]):
    """The samples of all steps, in the order in which they are seen."""

    def __init__(self, order: SampleOrder, *, length: int) -> None:
        self._order = order
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        (sample,) = self._order.take(index, 1)
        assert isinstance(sample, Sample), "sft learns from conversations"
        return sample


def pad(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return a batch, padded on the right to its longest sample."""
    token_ids_BT = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
    mask_BT, labels_BT = torch.zeros_like(token_ids_BT), torch.full_like(token_ids_BT, IGNORED)
    for row, sample in enumerate(samples):
        token_ids_T = torch.from_numpy(sample.token_ids_T).long()
        is_label_T = torch.from_numpy(sample.is_label_T)
        token_ids_BT[row, : len(sample)] = token_ids_T
        mask_BT[row, : len(sample)] = 1
        labels_BT[row, : len(sample)][is_label_T] = token_ids_T[is_label_T]
    return {"input_ids": token_ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def loss_sum(outputs: Any, labels_BT: Tensor) -> Tensor:
    """Return the summed loss of the labelled tokens, differentiable."""
    targets_BT = labels_BT[:, 1:]
    is_scored_BT = targets_BT != IGNORED
    logits_NV = outputs.logits[:, :-1][is_scored_BT].float()
    return F.cross_entropy(logits_NV, targets_BT[is_scored_BT], reduction="sum")


def mean_loss(outputs: Any, labels_BT: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Return a micro-batch's part of a step's mean; the Trainer names the arguments.

    A sum over the labels of the whole step: means of means would weigh short batches more.
    """
    return loss_sum(outputs, labels_BT) / num_items_in_batch
