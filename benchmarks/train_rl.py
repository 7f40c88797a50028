"""GRPO and PPO with rewards by rule, over several seeds: do rewards rise, how far is the drift?

    python -m benchmarks.train_rl [--methods grpo ppo] [--seeds 3] [--steps 60] [--plot FILE]

The model is a tiny random one and the rules ask for letters of three ranges, so that every answer
earns something between 0 and 3 and nothing but the reward is there to learn from. Drift from the
base costs (`kl_coef`); it is the mean over a step's drawn tokens of exp(d) - d - 1, where d is how
much likelier the base finds one (Schulman's k3).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

from benchmarks.train_jobs import Done, add_plot_option, run_job
from hack.tiny_model import write_tiny_model
from mizzen.runtime.train.curve_plot import lines_of, plot_lines

RANGES = ("a-m", "n-z", "A-M")
KL_COEF = 0.2
LIMIT_NATS = 1.0  # of drift, a token
WORDS = ("red", "green", "blue", "gold", "grey", "pink", "teal", "plum")


def train(root: Path, shared: Path, method: str, *, seed: int, steps: int) -> Done:
    return run_job(
        root,
        method=method,
        adaptation={"type": "lora", "rank": 4, "alpha": 8.0},
        base_model=str(shared / "model"),
        datasets=[{"name": "questions", "path": str(shared / "questions.jsonl")}],
        processing={"max_seq_len": 64, "holdout_ratio": 0.2},
        rl={
            "rewards": [{"type": "regex", "pattern": f"[{span}]"} for span in RANGES],
            "max_new_tokens": 8,
            "group_size": 8,
            "kl_coef": KL_COEF,
            "epochs": 2,
        },
        hyperparameters={
            "max_steps": steps,
            "batch_size": 4 if method == "grpo" else 32,
            "micro_batch": 32,
            "learning_rate": 0.005,
            "seed": seed,
            "dtype": "float32",
        },
        evaluation={"suites": [{"name": "worth", "type": "reward"}]},
    )


def print_row(method: str, seed: int, done: Done) -> tuple[bool, bool]:
    """Print a run's figures; return whether its reward rose, and whether its drift was bounded."""
    rewards = [record.measured["reward"] for record in done.curve]
    few = max(1, len(rewards) // 10)
    first, last = fmean(rewards[:few]), fmean(rewards[-few:])
    (suite,) = done.last_word["evaluation"]
    drift = max(record.measured["kl"] for record in done.curve)
    print(
        f"{method:>5} {seed:>4} {first:>12.3f} {last:>11.3f} {suite['base']:>13.3f} "
        f"{suite['candidate']:>13.3f} {drift:>17.4f}"
    )
    return last > first, drift < LIMIT_NATS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_rl")
    parser.add_argument("--methods", nargs="+", default=["grpo", "ppo"], choices=["grpo", "ppo"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    add_plot_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        write_tiny_model(shared / "model")
        rows = [json.dumps({"prompt": f"{i} {WORDS[i % len(WORDS)]}?"}) for i in range(64)]
        (shared / "questions.jsonl").write_text("\n".join(rows))
        print(
            f"{'':>5} {'seed':>4} {'first reward':>12} {'last reward':>11} {'holdout: base':>13} "
            f"{'candidate':>13} {'largest KL/token':>17}"
        )
        found, lines = [], []
        for method in options.methods:
            for seed in range(options.seeds):
                name = f"{method}-{seed}"
                done = train(shared / name, shared, method, seed=seed, steps=options.steps)
                found.append(print_row(method, seed, done))
                lines += lines_of(name, done.curve)
        rose, bounded = (sum(flags) for flags in zip(*found, strict=True))
        print(
            f"the reward rose in {rose} of {len(found)} runs; "
            f"the drift stayed below {LIMIT_NATS} nat a token in {bounded}"
        )
    if options.plot:
        plot_lines(lines, options.plot, title="Rules as reward, a run for each seed")


if __name__ == "__main__":
    main()
