"""A student that learns from a teacher's drawn ids, against one that learns from the text alone.

    python -m benchmarks.distill [--text FILE ...] [--steps 200] [--samples 16 64] [--plot FILE]

Teacher (6 layers of 256) and students (2 of 128) start from random weights and read the same text
in the same order: by default the Python reference that every installation brings; recorded figures
are of plays by Shakespeare, the files shksprdata/texts/*_gut.txt of the package shakespeare 0.6.
What is compared is the loss on held-out passages, in nats a token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.train_jobs import Done, add_plot_option, run_job
from hack.tiny_model import SPECIAL_TOKENS, write_tiny_model
from mizzen.runtime.train.curve_plot import lines_of, plot_lines

PASSAGE_CHARACTERS = 400


def passages(text: str) -> list[str]:
    starts = range(0, len(text) - PASSAGE_CHARACTERS, PASSAGE_CHARACTERS)
    return [text[start : start + PASSAGE_CHARACTERS] for start in starts]


def train_tokenizer(text: str, *, size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages(text), trainer)
    return tokenizer


def train(root: Path, model: Path, data: Path, *, steps: int, batch: int, **method: Any) -> Done:
    return run_job(
        root,
        adaptation={"type": "full"},
        base_model=str(model),
        datasets=[{"name": "text", "path": str(data)}],
        processing={"max_seq_len": 512, "holdout_ratio": 0.1, "loss_on": "all"},
        hyperparameters={
            "max_steps": steps,
            "batch_size": batch,
            "micro_batch": batch,
            "learning_rate": 2e-3,
            "dtype": "float32",
        },
        evaluation={"suites": [{"name": "holdout"}]},
        **method,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files; the Python reference")
    parser.add_argument("--characters", type=int, default=800_000, help="most that are read")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--vocabulary", type=int, default=2048)
    add_plot_option(parser)
    options = parser.parse_args()
    parts = [path.read_text() for path in options.text] if options.text else topics.values()
    text = "\n".join(parts)[: options.characters]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "text.jsonl"
        turns = ([{"role": "assistant", "content": passage}] for passage in passages(text))
        data.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
        tokenizer = train_tokenizer(text, size=options.vocabulary)
        large = write_tiny_model(root / "l", layers=6, width=256, tokenizer=tokenizer)
        small = write_tiny_model(root / "s", layers=2, width=128, tokenizer=tokenizer)
        teacher = train(
            root / "teacher", large, data, steps=options.teacher_steps, batch=options.batch
        )
        print(f"teacher                {teacher.last_word['evalLoss']:.4f} nats a token")
        sizes = {"steps": options.steps, "batch": options.batch}
        student = train(root / "alone", small, data, **sizes)
        alone = student.last_word["evalLoss"]
        lines = lines_of("teacher", teacher.curve) + lines_of("text alone", student.curve)
        print(f"student, text alone    {alone:.4f}")
        for count in options.samples:
            rules = {"teacher": str(teacher.artifact), "samples": count}
            student = train(
                root / f"taught-{count}", small, data, **sizes, method="distill", distill=rules
            )
            loss = student.last_word["evalLoss"]
            print(f"student, {count:>3} drawn ids {loss:.4f}  better by {alone - loss:+.4f}")
            lines += lines_of(f"{count} drawn ids", student.curve)
    if options.plot:
        plot_lines(lines, options.plot, title="Learning from a teacher's drawn ids")


if __name__ == "__main__":
    main()
