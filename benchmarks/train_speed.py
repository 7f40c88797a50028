"""Tokens a second of fine-tuning, beside transformers' Trainer (and PEFT's LoRA) in the same run.

    python -m benchmarks.train_speed lora --model MODEL [--steps 20] [--rounds 3] [--plot FILE]
    python -m benchmarks.train_speed full [--steps 60] [--rounds 3] [--plot FILE]

Both learn from the same samples in the same order, with the same batch, optimizer, number type and
threads; the runs take turns. `lora` takes a checkpoint directory, such as SmolLM2-135M-Instruct;
`full` makes a LLaMA with 4.7 million random weights. Time goes by in training alone, without
loading and publishing, and only tokens of samples count: padding taught nobody.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train_jobs import add_plot_option, run_job
from hack.datasets import chatterbot_samples
from hack.tiny_model import write_tiny_model
from mizzen.runtime.train.curve_plot import Line, plot_lines

Pair = tuple[dict[str, Any], dict[str, Any]]
_DIALOGUES = 6  # that follow each other in one sample


def write_conversations(path: Path) -> None:
    """Write conversations of a few hundred tokens."""
    turns = [sample["messages"] for sample in chatterbot_samples()]
    groups = (turns[i : i + _DIALOGUES] for i in range(0, len(turns), _DIALOGUES))
    rows = ({"messages": [turn for dialogue in group for turn in dialogue]} for group in groups)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def describe(kind: str, model: Path, data: Path, *, steps: int) -> dict[str, Any]:
    """Return the sections of job.json that both sides read."""
    adaptation = {"type": "lora", "rank": 16, "alpha": 32.0} if kind == "lora" else {"type": "full"}
    return {
        "adaptation": adaptation,
        "base_model": str(model),
        "datasets": [{"name": "chat", "path": str(data)}],
        "processing": {"max_seq_len": 512, "holdout_ratio": 0.1},
        "hyperparameters": {
            "max_steps": steps,
            "batch_size": 8,
            "micro_batch": 4,
            "learning_rate": 2e-4 if kind == "lora" else 1e-3,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
        },
    }


def ours(root: Path, document: dict[str, Any]) -> dict[str, Any]:
    done = run_job(root, **document)
    return {
        # Of all steps, as the rival's: the progress document has the last few ones' only.
        "tokens_per_s": 1000 * done.counters.tokens / done.counters.trained_ms,
        "losses": [record.loss for record in done.curve],
    }


def theirs(job: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_rival", str(job)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def compare(kind: str, model: Path | None, *, steps: int, rounds: int) -> list[Pair]:
    """Print and return what each round came to: ours, and the rival's."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_conversations(root / "chat.jsonl")
        if model is None:
            model = write_tiny_model(root / "model", layers=7, width=256, heads=8, kv_heads=8)
        document = describe(kind, model, root / "chat.jsonl", steps=steps)
        pairs = []
        for number in range(rounds):
            mine = ours(root / f"job-{number}", document)
            rival = theirs(root / f"job-{number}" / "job.json")
            pairs.append((mine, rival))
            report(pairs[-1:])
        print("all rounds:")
        report(pairs)
    return pairs


def draw(pair: Pair, path: Path, *, title: str) -> None:
    lines = [
        Line(run=run, figure="loss", points=list(enumerate(side["losses"], 1)))
        for run, side in zip(("Mizzen", "Trainer"), pair, strict=True)
    ]
    plot_lines(lines, path, title=title)


def report(pairs: list[Pair]) -> None:
    speeds = [[one["tokens_per_s"] for one in side] for side in zip(*pairs, strict=True)]
    mine, rival = map(statistics.median, speeds)
    last = [statistics.fmean(one["losses"][-5:]) for one in pairs[-1]]
    print(f"ours {mine:.0f} tokens/s, Trainer {rival:.0f} tokens/s, ratio {mine / rival:.2f}")
    print(f"mean loss of the last 5 steps: ours {last[0]:.4f}, Trainer {last[1]:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_speed")
    parser.add_argument("kind", choices=["lora", "full"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    add_plot_option(parser)
    options = parser.parse_args()
    if options.kind == "lora" and options.model is None:
        parser.error("lora needs --model")
    pairs = compare(options.kind, options.model, steps=options.steps, rounds=options.rounds)
    if options.plot:
        draw(pairs[-1], options.plot, title=f"Fine-tuning, {options.kind}")


if __name__ == "__main__":
    main()
