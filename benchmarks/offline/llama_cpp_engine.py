"""llama.cpp as a worker, through llama-cpp-python; runs in the peer's environment.

The package's own generator runs one sequence at a time, so the batch is driven through its
bindings as llama.cpp's `examples/batched` does: every sequence advances in each call.
"""

import ctypes
import tempfile
from pathlib import Path

import llama_cpp as lib
import numpy as np

from benchmarks.offline.protocol import Generate, Job, answer_batches

_FORMATS = {
    "none": lib.LLAMA_FTYPE_MOSTLY_BF16,
    "int8": lib.LLAMA_FTYPE_MOSTLY_Q8_0,
    "int4": lib.LLAMA_FTYPE_MOSTLY_Q4_1,
}
_STEP_TOKENS = 2048


class Batch:
    """One context, and the tokens of its next call."""

    def __init__(self, model: lib.llama_model_p, job: Job) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = job.max_model_len * job.max_num_seqs
        params.n_seq_max = job.max_num_seqs
        params.n_batch = params.n_ubatch = _STEP_TOKENS
        params.n_threads = params.n_threads_batch = job.threads
        self._context = lib.llama_init_from_model(model, params)
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._batch = lib.llama_batch_init(_STEP_TOKENS, 0, 1)
        self._sampled: list[tuple[int, int]] = []  # place in the batch, sequence
        self.next_tokens: dict[int, int] = {}  # of each sequence, after `decode`

    def clear(self) -> None:
        """Forget every sequence."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        self.next_tokens.clear()

    def add(self, token: int, position: int, sequence: int, *, samples: bool) -> None:
        """Put in one token; a full batch is computed first."""
        if self._batch.n_tokens == _STEP_TOKENS:
            self.decode()
        at = self._batch.n_tokens
        self._batch.token[at], self._batch.pos[at] = token, position
        self._batch.n_seq_id[at] = 1
        self._batch.seq_id[at][0] = sequence
        self._batch.logits[at] = samples
        self._batch.n_tokens += 1
        if samples:
            self._sampled.append((at, sequence))

    def decode(self) -> None:
        """Compute what was put in, and choose each sampled sequence's likeliest token."""
        if code := lib.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode answered {code}")
        for at, sequence in self._sampled:
            row = lib.llama_get_logits_ith(self._context, at)
            self.next_tokens[sequence] = int(np.ctypeslib.as_array(row, (self._vocab,)).argmax())
        self._sampled.clear()
        self._batch.n_tokens = 0


def load(job: Job) -> Generate:
    """Convert the GGUF file to the wanted format and load it."""
    lib.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = _convert(Path(job.model), Path(folder) / "model.gguf", job.quantization)
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_mmap = False  # the file goes away
        # On x86 these are layouts for AMX (and of formats not used here), whose kernels end with an
        # illegal instruction on some virtual machines. The AVX-512 kernels stay.
        params.use_extra_bufts = False
        model = lib.llama_model_load_from_file(str(path).encode(), params)
    batch = Batch(model, job)

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        batch.clear()
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                batch.add(token, position, sequence, samples=position == len(prompt) - 1)
        batch.decode()
        for step in range(output_tokens - 1):
            for sequence, prompt in enumerate(prompts):
                token = batch.next_tokens[sequence]
                batch.add(token, len(prompt) + step, sequence, samples=True)
            batch.decode()
        return [output_tokens] * len(prompts)

    return generate


def _convert(source: Path, target: Path, quantization: str) -> Path:
    params = lib.llama_model_quantize_default_params()
    params.ftype = _FORMATS[quantization]
    params.allow_requantize = True  # the file in the package has 4 bits already
    arguments = (str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code := lib.llama_model_quantize(*arguments):
        raise RuntimeError(f"{source} could not be converted: code {code}")
    return target


if __name__ == "__main__":
    answer_batches(load)
