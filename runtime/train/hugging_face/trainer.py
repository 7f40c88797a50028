"""Hugging Face's Trainer with our loss, our order of samples and our learning rates.

Its steps then mean what our loop's mean: same data, same sums, same rates, same clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mizzen.runtime.train.config import Hyperparameters
from mizzen.runtime.train.hugging_face.model import LanguageModel
from mizzen.runtime.train.hugging_face.rows import OrderedSamples, mean_loss, pad
from mizzen.runtime.train.schedule import learning_rate


class ScheduledTrainer(Trainer):
    """The Trainer of one generation; `rate_steps` are those the learning rate is planned over."""

    def __init__(
        self,
        model: LanguageModel,
        samples: OrderedSamples,
        arguments: TrainingArguments,
        *,
        hyper: Hyperparameters,
        rate_steps: int,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(
            model,
            arguments,
            train_dataset=samples,
            data_collator=pad,
            compute_loss_func=mean_loss,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # it would print each step
        self._hyper = hyper
        self._rate_steps = rate_steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return what sets the rate of each step: the rates of our own loop."""
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._rate_ratio)
        return self.lr_scheduler

    def save_checkpoint_into(self, folder: Path) -> None:
        """Write the Trainer's own checkpoint of the last whole step into a folder."""
        self.args.output_dir = str(folder)
        # What the Trainer's callback for signals calls, too: nothing public saves between steps.
        self._save_checkpoint(self.model, trial=None)

    def _rate_ratio(self, steps_done: int) -> float:
        """Return the next step's share of the highest rate."""
        return learning_rate(
            steps_done + 1,
            total=self._rate_steps,
            peak=1.0,
            warmup_ratio=self._hyper.warmup_ratio,
            shape=self._hyper.scheduler,
        )


def find_checkpoint_in(folder: Path) -> Path:
    """Return the Trainer's own checkpoint in one of ours."""
    (found,) = folder.glob("checkpoint-*")
    return found


def rows_at_once(hyper: Hyperparameters) -> int:
    """Return how many samples run at once: the Trainer needs a divisor of the batch."""
    candidates = range(min(hyper.micro_batch, hyper.batch_size), 0, -1)
    return next(count for count in candidates if hyper.batch_size % count == 0)


def build_arguments(
    hyper: Hyperparameters,
    *,
    steps: int,
    directory: Path,
    device: torch.device,
    is_autocast: bool,
) -> TrainingArguments:
    """Return the Trainer's settings for one device; what is kept, and when, is decided by us."""
    rows = rows_at_once(hyper)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=hyper.batch_size // rows,
        learning_rate=hyper.learning_rate,
        weight_decay=hyper.weight_decay,
        max_grad_norm=hyper.grad_clip,
        seed=hyper.seed,
        train_sampling_strategy="sequential",
        bf16=is_autocast,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        # On all devices of a pod it would multiply the batch; our jobs compute on one.
        arguments._n_gpu = 1
    return arguments
