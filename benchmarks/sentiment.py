"""A real task learned through our own job: the sentiment of product reviews, by a LoRA adapter.

    python -m benchmarks.sentiment MODEL [--samples 1000] [--steps 120] [--plot FILE]

The data are snippets that people rated (vaderSentiment's, clear ratings only). The gate's
classification suite asks base and adapter, by the same code, about the third of them that is held
out: is "positive" or "negative" the likelier answer?
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.rows import Rows
from benchmarks.train_jobs import add_plot_option, run_job
from hack.datasets import write_sentiment
from mizzen.runtime.train.curve_plot import lines_of, plot_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=120)
    add_plot_option(parser)
    options = parser.parse_args()
    rows = Rows("Sentiment of product reviews, held out")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "reviews.jsonl"
        write_sentiment(data, limit=options.samples)
        began_s = time.monotonic()
        done = run_job(
            Path(folder) / "sentiment",
            base_model=str(options.model),
            adaptation={"type": "lora", "rank": 8, "alpha": 16.0},
            datasets=[{"name": "reviews", "path": str(data)}],
            processing={"max_seq_len": 192, "holdout_ratio": 0.33},
            hyperparameters={
                "max_steps": options.steps,
                "batch_size": 8,
                "micro_batch": 8,
                "learning_rate": 1e-3,
            },
            evaluation={
                "suites": [
                    {
                        "name": "sentiment",
                        "type": "classification",
                        "labels": ["positive", "negative"],
                    }
                ]
            },
        )
    word = done.last_word
    (suite,) = word["evaluation"]
    rows.add(
        {
            "base_percent": round(100 * suite["base"], 1),
            "adapter_percent": round(100 * suite["candidate"], 1),
            "held_out": suite["samples"],
            "trained_on": word["dataset"]["samples"],
            "steps": word["step"],
            "seconds": round(time.monotonic() - began_s),
        }
    )
    rows.print_table()
    if options.plot:
        lines = lines_of(options.model.name, done.curve)
        plot_lines(lines, options.plot, title="Sentiment of reviews by LoRA")


if __name__ == "__main__":
    main()
