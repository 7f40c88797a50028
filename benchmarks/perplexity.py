"""Perplexity of our model code at 16, 8 and 4 bits beside transformers, on the same windows.

    python -m benchmarks.perplexity MODEL_DIR [--tokens 16384] [--window 512]

The text is Python's own reference, `pydoc_data.topics`: English prose that every Python has with
it. `over_reference` is the change against transformers in bfloat16, in percent; transformers in
float32 shows how much of that is rounding.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.offline.protocol import Job
from benchmarks.offline.transformers_generate import load_model
from benchmarks.rows import Rows
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.loader import load_decoder

# Shapes: W tokens of a window, V vocabulary.
Logits = Callable[[Tensor], Tensor]  # token_ids_W -> float32 logits_WV
REFERENCE = "transformers bfloat16"


def windows(model: Path, *, tokens: int, window: int) -> list[Tensor]:
    """Return the text's first tokens, cut into windows of equal length."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Tokenizing takes a second per million characters; a token has at least one.
    ids = Tokenizer.load(model).encode(text[: 8 * tokens], add_special_tokens=False)[:tokens]
    return [torch.tensor(ids[i : i + window]) for i in range(0, len(ids) - window + 1, window)]


@torch.inference_mode()
def perplexity(logits: Logits, texts: list[Tensor]) -> float:
    """Return e to the mean negative log likelihood of every token but each window's first."""
    losses = [F.cross_entropy(logits(text)[:-1], text[1:], reduction="sum") for text in texts]
    return math.exp(float(sum(losses)) / sum(len(text) - 1 for text in texts))


@contextmanager
def our_logits(model: Path, quantization: str) -> Iterator[Logits]:
    """Lend our model as the engine runs it, without its cache."""
    decoder = load_decoder(model, dtype="bfloat16", quantization=quantization)
    decoder.prepack()

    def logits(text: Tensor) -> Tensor:
        attend = CausalAttention([len(text)])
        return decoder.logits(decoder(text, torch.arange(len(text)), attend))

    yield logits


@contextmanager
def their_logits(model: Path, dtype: str, threads: int) -> Iterator[Logits]:
    """Lend transformers' model."""
    job = Job(str(model), threads=threads, max_model_len=0, max_num_seqs=1, dtype=dtype)
    theirs = load_model(job)
    yield lambda text: theirs(text[None]).logits[0].float()


def main() -> None:
    """Print one JSON line per number format, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    model, threads = arguments.model, arguments.threads
    torch.set_num_threads(threads)
    texts = windows(model, tokens=arguments.tokens, window=arguments.window)
    runs = {
        REFERENCE: their_logits(model, "bfloat16", threads),
        "transformers float32": their_logits(model, "float32", threads),
        "mizzen bfloat16": our_logits(model, "none"),
        "mizzen int8": our_logits(model, "int8"),
        "mizzen int4": our_logits(model, "int4"),
    }
    counted = sum(len(text) - 1 for text in texts)
    rows = Rows(f"Perplexity of {counted} tokens, {len(texts)} windows: {model.name}")
    found: dict[str, float] = {}
    for name, lent in runs.items():
        with lent as logits:
            found[name] = perplexity(logits, texts)
        over = 100 * (found[name] / found[REFERENCE] - 1)
        rows.add(
            {
                "model": name,
                "perplexity": round(found[name], 4),
                "over_reference_pct": round(over, 3),
            }
        )
    rows.print_table()


if __name__ == "__main__":
    main()
