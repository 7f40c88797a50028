"""The job of benchmarks.train_speed, done by transformers' Trainer and PEFT: speed and losses out.

python -m benchmarks.train_rival job.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.train.batches import SampleOrder
from mizzen.runtime.train.config import TrainConfig, load_config
from mizzen.runtime.train.data import prepare
from mizzen.runtime.train.device import choose_dtype, use_own_cpus
from mizzen.runtime.train.sources import load_source

_IGNORED = -100


def run_rival(job: Path) -> dict[str, Any]:
    """Train as job.json says, with transformers' Trainer."""
    use_own_cpus()
    config = load_config(job)
    hyper = config.hyperparameters
    rows = ordered_rows(config)
    dtype = choose_dtype("auto", torch.device("cpu"))
    is_lora = config.adaptation.type == "lora"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.base_model, dtype=dtype if is_lora else torch.float32
    )
    if is_lora:
        rules = LoraConfig(
            r=config.adaptation.rank,
            lora_alpha=config.adaptation.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, rules)

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(rows)

    arguments = transformers.TrainingArguments(
        output_dir=str(job.parent / "rival"),
        max_steps=hyper.max_steps,
        per_device_train_batch_size=hyper.micro_batch,
        gradient_accumulation_steps=hyper.batch_size // hyper.micro_batch,
        learning_rate=hyper.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=hyper.grad_clip,
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Ordered(model, arguments, train_dataset=rows, data_collator=pad)
    runtime_s = trainer.train().metrics["train_runtime"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return {"tokens_per_s": tokens / runtime_s, "losses": losses}


def ordered_rows(config: TrainConfig) -> list[dict[str, list[int]]]:
    """Return the samples of all steps, in the order in which our loop takes them."""
    sources = [
        load_source(dataset, default_format="auto", shape="conversation")
        for dataset in config.datasets
    ]
    data = prepare(sources, Tokenizer.load(config.base_model), config.processing)
    hyper = config.hyperparameters
    order = SampleOrder(data, seed=hyper.seed)
    rows = []
    for sample in order.take(0, hyper.max_steps * hyper.batch_size):
        ids = sample.token_ids_T.tolist()
        labels = [
            i if wanted else _IGNORED for i, wanted in zip(ids, sample.is_label_T, strict=True)
        ]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Return one batch, padded to its longest row."""
    longest = max(len(row["input_ids"]) for row in rows)
    blank = {"input_ids": 0, "labels": _IGNORED, "attention_mask": 0}
    full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in full])
        for key, fill in blank.items()
    }


if __name__ == "__main__":
    print(json.dumps(run_rival(Path(sys.argv[1]))))
