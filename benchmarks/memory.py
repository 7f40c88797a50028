"""What a runtime keeps in memory beside weights and KV cache.

    python -m benchmarks.memory MODEL_DIR [--kv-cache-gib 0.125] [--requests 32]

Starts `mizzen serve` with a KV cache small enough that the requests write to all of it: pages
that nothing was written to are not memory yet, and subtracting them would flatter. Then reads the
PSS of all its processes while it waits, in which a page shared by several counts once. Libraries
that other programs use too count in part only: nothing else with torch should run meanwhile.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

from benchmarks.checkpoint import kv_token_bytes, weight_bytes
from benchmarks.load_generator import run_load
from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows
from benchmarks.servers import MODEL_NAME, serving, start_mizzen, vocab_size

_MB = 1e6
_SETTLE_S = 5.0  # an engine gives memory back once it has rested for a while


def main() -> None:
    """Print one JSON line, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kv-cache-gib", type=float, default=0.125)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-tokens", type=int, default=192)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    model, length = arguments.model.resolve(), arguments.input_tokens
    kv_bytes = int(arguments.kv_cache_gib * 2**30)
    written = arguments.requests * (length + arguments.output_tokens) * kv_token_bytes(model)
    if written < kv_bytes:
        parser.error(f"the requests write {written} bytes of KV: lower --kv-cache-gib")
    start = partial(
        start_mizzen,
        model,
        "--dtype=bfloat16",
        f"--kv-cache-gib={arguments.kv_cache_gib}",
        f"--max-model-len={length + arguments.output_tokens}",
        threads=arguments.threads,
    )
    prompts = random_prompts(
        arguments.requests, shortest=length, longest=length, vocab_size=vocab_size(model), seed=1
    )
    with serving(start) as (server,):
        run_load(server.url, MODEL_NAME, prompts, output_tokens=arguments.output_tokens, at_once=8)
        time.sleep(_SETTLE_S)
        pss_bytes, anonymous_bytes = server.tree.pss_bytes(), server.tree.anonymous_bytes()
    rows = Rows(f"Memory after {arguments.requests} requests: {model.name}")
    weights = weight_bytes(model)
    rows.add(
        {
            "pss_mb": round(pss_bytes / _MB, 1),
            "anonymous_mb": round(anonymous_bytes / _MB, 1),
            "weights_mb": round(weights / _MB, 1),
            "kv_mb": round(kv_bytes / _MB, 1),
            "beside_mb": round((pss_bytes - weights - kv_bytes) / _MB, 1),
        }
    )
    rows.print_table()


if __name__ == "__main__":
    main()
