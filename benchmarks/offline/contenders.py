"""The engines of a comparison, each in a process of its own, of which one computes at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.offline.protocol import Job
from benchmarks.peers import peer_python, vllm_environment
from benchmarks.processes import ProcessTree
from benchmarks.prompts import Prompts

NAMES = (
    "mizzen",
    "transformers",  # generate
    "transformers-batch",  # its continuous batching
    "vllm",  # with our number of threads
    "vllm-auto",  # with the number that it chooses
    "llama-cpp",
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a batch of prompts took; processor seconds are of all processes and threads."""

    wall_s: float
    cpu_s: float


class ContenderFailedError(RuntimeError):
    """A worker ended; the text has the end of its log."""


class Contender:
    """A loaded engine that waits, paused, for its turn."""

    def __init__(self, name: str, job: Job, folder: Path) -> None:
        self.name = name
        python, module, environment = _command(name, job)
        self._tree = ProcessTree(
            [python, "-m", f"benchmarks.offline.{module}", job.to_argument()],
            folder / f"{name}.log",
            cores=job.threads,
            environment=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self._read()
        except BaseException:
            self._tree.stop()
            raise
        self._tree.pause()

    def generate(self, prompts: Prompts, output_tokens: int) -> Cost:
        """Continue every prompt by so many tokens, all at once."""
        self._tree.resume()
        before_s = self._tree.cpu_s()
        question = {"prompts": prompts, "output_tokens": output_tokens}
        print(json.dumps(question), file=self._tree.stdin, flush=True)
        answer = self._read()
        cost = Cost(answer["wall_s"], self._tree.cpu_s() - before_s)
        self._tree.pause()
        if answer["output_tokens"] != [output_tokens] * len(prompts):
            raise ContenderFailedError(f"{self.name} ended answers early: {answer}")
        return cost

    def stop(self) -> None:
        """End the worker."""
        self._tree.stop()

    def _read(self) -> dict:
        if line := self._tree.stdout.readline():
            return json.loads(line)
        raise ContenderFailedError(f"{self.name} has ended:\n{self._tree.last_words()}")


def _command(name: str, job: Job) -> tuple[str, str, dict[str, str | None]]:
    """Return a contender's Python, module and variables."""
    ours: dict[str, str | None] = {"OMP_NUM_THREADS": str(job.threads)}
    match name:
        case "mizzen":
            return sys.executable, "mizzen_engine", ours
        case "transformers":
            return sys.executable, "transformers_generate", ours
        case "transformers-batch":
            return sys.executable, "transformers_batch", ours
        case "llama-cpp":
            return str(peer_python("llama-cpp")), "llama_cpp_engine", ours
        case "vllm" | "vllm-auto":
            environment = vllm_environment(job.threads if name == "vllm" else None)
            return str(peer_python("vllm")), "vllm_engine", environment
    raise ValueError(f"{name} is none of {', '.join(NAMES)}")


@contextmanager
def loaded(names: Sequence[str], job: Job, gguf: Path | None) -> Iterator[list[Contender]]:
    """Load the engines one after the other; llama.cpp reads `gguf` in place of the directory."""
    contenders: list[Contender] = []
    with TemporaryDirectory() as folder:
        try:
            for name in names:
                # Only ours and llama.cpp have fewer bits to offer for a plain checkpoint.
                own = job if name in ("mizzen", "llama-cpp") else replace(job, quantization="none")
                if name == "llama-cpp" and gguf is not None:
                    own = replace(own, model=str(gguf))
                contenders.append(Contender(name, own, Path(folder)))
            yield contenders
        finally:
            for contender in contenders:
                contender.stop()
