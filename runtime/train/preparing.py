"""Which way a job's data is prepared: in this process, or in blocks on Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from mizzen.runtime.train.config import Dataset, Processing
from mizzen.runtime.train.data import Prepared, prepare
from mizzen.runtime.train.errors import EngineMissingError, JobConfigError
from mizzen.runtime.train.memory import memory_limit
from mizzen.runtime.train.records import Shape
from mizzen.runtime.train.render import ChatRenderer
from mizzen.runtime.train.sources import load_source
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.surroundings import Stage

log = logging.getLogger(__name__)

# Chosen, not measured: benchmarks/data_memory.py prints what each engine takes.
LARGE_BYTES = 256 << 20
_WORKER_BYTES = 1 << 30  # allowed for, with its packages and the objects of a block
_PACKAGES = ("pandas", "pyarrow", "ray")


@dataclass(frozen=True, slots=True)
class Pod:
    """What the large path needs of a trainer's pod."""

    stop: StopFlag
    stage: Stage | None = None


def choose_engine(
    wanted: Literal["Auto", "InProcess", "Ray"], *, data_bytes: int, missing: Sequence[str]
) -> Literal["InProcess", "Ray"]:
    """Return the way to go; pure.

    Args:
        wanted: What the job says.
        data_bytes: Of all its files that are not behind a URL.
        missing: The packages that Ray Data needs and that are not there.

    Raises:
        EngineMissingError: the job insists on what is not there.
    """
    if wanted == "Ray" and missing:
        raise EngineMissingError(missing)
    if wanted != "Auto":
        return wanted
    return "Ray" if data_bytes >= LARGE_BYTES and not missing else "InProcess"


def count_workers(*, cpus: int, limit_bytes: int) -> int:
    """Return how many processes read blocks: one for a CPU, as far as memory goes. Pure."""
    return max(1, min(cpus, limit_bytes // _WORKER_BYTES - 1))


def prepare_data(
    datasets: tuple[Dataset, ...],
    renderer: ChatRenderer,
    rules: Processing,
    shape: Shape,
    *,
    pod: Pod | None,
) -> Prepared:
    """Read, render, label, shorten and split everything a job trains on.

    Args:
        datasets: Where it is.
        renderer: The model's template.
        rules: How samples become tokens.
        shape: What the method learns from.
        pod: None: there is none but that of a replica which serves.

    Raises:
        DatasetError: it cannot be read, or nothing would be learned from it.
        JobError: the way that the job wants cannot be gone.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if pod is None and rules.engine == "Ray":
        raise JobConfigError(
            "processing.engine Ray needs a pod of the job's own: set it to Auto, or leave "
            "mode: Loan out."
        )
    data_bytes = measure_files(datasets)
    engine = choose_engine(rules.engine, data_bytes=data_bytes, missing=missing)
    if pod is not None and engine == "Ray":
        return _prepare_on_ray(datasets, renderer, rules, shape, pod)
    if data_bytes >= LARGE_BYTES and rules.engine == "Auto":
        why = f"{missing[0]} is missing" if missing else "a replica lends no processes"
        log.warning("%d MiB of data are prepared in this process, as %s.", data_bytes >> 20, why)
    sources = [
        load_source(dataset, default_format=rules.format, shape=shape) for dataset in datasets
    ]
    return prepare(sources, renderer, rules)


def measure_files(datasets: Sequence[Dataset]) -> int:
    """Return the bytes of all files there are; what is not there is found missing later."""
    paths = [dataset.path for dataset in datasets if dataset.path is not None]
    paths += [p for d in datasets if d.feedback is not None for p in d.feedback.glob("*.jsonl")]
    return sum(map(_size, paths))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _prepare_on_ray(
    datasets: tuple[Dataset, ...],
    renderer: ChatRenderer,
    rules: Processing,
    shape: Shape,
    pod: Pod,
) -> Prepared:
    # All of it takes seconds to import, and few jobs want it.
    from mizzen.runtime.train.large.pod_ray import pod_ray  # noqa: PLC0415

    with pod_ray(pod.stage, pod.stop) as place:
        from mizzen.runtime.train.large.on_ray import ray_crew  # noqa: PLC0415
        from mizzen.runtime.train.large.prepare import prepare_large  # noqa: PLC0415
        from mizzen.runtime.train.large.work import BlockReader  # noqa: PLC0415

        workers = count_workers(
            cpus=torch.get_num_threads(), limit_bytes=memory_limit(torch.device("cpu"))
        )
        log.info("The data is prepared on Ray, by %d processes.", workers)
        crew = ray_crew(workers=workers, place=place)
        reader = BlockReader(datasets=datasets, rules=rules, shape=shape)
        return prepare_large(reader, renderer, crew)
