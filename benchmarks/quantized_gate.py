"""Does the gate tell harmless compression from harmful? A limit of 2 % on perplexity.

    python -m benchmarks.quantized_gate MODEL [--samples 40]

Each row is a whole job: int8, int4 in groups of 32 and 2:4 pruning, all without calibration. The
text is Python's own reference, `pydoc_data.topics`, of which half is held out.
"""

import argparse
import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.rows import Rows
from benchmarks.train_jobs import run_job

JOBS: dict[str, dict[str, Any]] = {
    "int8": {"method": "quantize", "quantize": {"scheme": "int8"}},
    "int4 g32": {"method": "quantize", "quantize": {"scheme": "int4", "group_size": 32}},
    "2:4": {"method": "prune", "prune": {"kind": "nm24"}},
}
_WORDS = 150


def write_prose(path: Path, count: int) -> None:
    """Write passages of equal length, each as the answer to a question for its topic."""
    rows = []
    for name in sorted(topics):
        words = topics[name].split()
        for start in range(0, len(words) - _WORDS, _WORDS):
            text = " ".join(words[start : start + _WORDS])
            rows.append(json.dumps({"prompt": f"Explain {name}.", "completion": text}))
    path.write_text("\n".join(rows[i * len(rows) // count] for i in range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=40)
    options = parser.parse_args()
    rows = Rows("A gate of at most 2 % more perplexity")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prose.jsonl"
        write_prose(data, options.samples)
        for name, method in JOBS.items():
            word = run_job(
                Path(folder) / name.replace(" ", "-").replace(":", "-"),
                **method,
                base_model=str(options.model),
                datasets=[{"name": "prose", "path": str(data)}],
                processing={"max_seq_len": 512, "holdout_ratio": 0.5},
                evaluation={"suites": [{"name": "prose", "max_regression_ratio": 0.02}]},
            ).last_word
            (suite,) = word["evaluation"]
            rows.add(
                {
                    "weights": name,
                    "base": round(suite["base"], 2),
                    "result": round(suite["candidate"], 2),
                    "worse_percent": round(100 * suite["regressionRatio"], 2),
                    "passages": suite["samples"],
                    "published": "yes" if word["artifact"] else "no",
                }
            )
    rows.print_table()


if __name__ == "__main__":
    main()
