"""What preparing a large data set takes of memory, by each engine.

    python -m benchmarks.data_memory MODEL_DIR [--mb 300]

Writes chat rows of about 1 KB and prepares them with the model's tokenizer, each time in a process
of its own. `trainer` is the peak of that process's resident memory, `kept` what it holds of its own
once the data is ready (pages of files that it has mapped can be dropped and do not count), and
`all` the highest sum over it and Ray's processes, in which a shared page counts in parts.
"""

import argparse
import json
import logging
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil

from benchmarks.rows import Rows
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.train.config import Dataset, Processing
from mizzen.runtime.train.device import use_own_cpus
from mizzen.runtime.train.preparing import Pod, prepare_data
from mizzen.runtime.train.stop import StopFlag

_MB = 1e6
_LOOK_S = 0.5


def main() -> None:
    """Print one JSON line, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--mb", type=int, default=300)
    parser.add_argument("--prepare", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        engine, file = arguments.prepare
        print(json.dumps(prepare(engine, Path(file), arguments.model)))
        return
    rows = Rows("What preparing the data takes")
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.jsonl", arguments.mb)
        for engine in ("InProcess", "Ray"):
            command = [sys.executable, "-m", "benchmarks.data_memory", str(arguments.model)]
            command += ["--prepare", engine, str(path)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.add({"engine": engine, **json.loads(answer.stdout.splitlines()[-1])})
    rows.print_table()


def write_rows(path: Path, mb: int) -> Path:
    """Write a file of so many megabytes."""
    words = re.findall(r"\w+", " ".join(topics.values()))  # English, of Python's own manual
    draw, written = random.Random(0), 0
    with path.open("w") as file:
        while written < mb * _MB:
            question, answer = (" ".join(draw.choices(words, k=80)) for _ in range(2))
            written += file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    return path


def prepare(engine: str, path: Path, model: Path) -> dict[str, float]:
    """Prepare the data; return megabytes and seconds."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    use_own_cpus()
    me, tokenizer = psutil.Process(), Tokenizer.load(model)
    before, peak, is_over = me.memory_info().rss, [0], threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_S):
            peak[0] = max(peak[0], sum(map(_pss, [me, *me.children(recursive=True)])))

    watcher = threading.Thread(target=look)
    watcher.start()
    started_at = time.monotonic()
    rules = Processing.model_validate({"engine": engine, "max_seq_len": 4096})
    datasets = (Dataset(name="rows", path=path),)
    data = prepare_data(datasets, tokenizer, rules, "conversation", pod=Pod(StopFlag()))
    took_s = time.monotonic() - started_at
    is_over.set()
    watcher.join()
    status = Path("/proc/self/status").read_text()
    figures = dict(line.split(":") for line in status.splitlines())
    return {
        "samples": data.samples,
        "before_mb": round(before / _MB),
        "trainer_mb": round(_kib(figures["VmHWM"]) / 1000),
        "kept_mb": round(_kib(figures["RssAnon"]) / 1000),
        "all_mb": round(peak[0] / _MB),
        "seconds": round(took_s),
    }


def _kib(text: str) -> float:
    return int(text.split()[0]) * 1.024


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
