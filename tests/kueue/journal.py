"""Tells what changes in a namespace while a test runs: jobs, pods, and Kueue's Workloads."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Self

from hack.cluster.api_only import ApiCluster
from hack.cluster.progress import say
from mizzen.operator.desired.labels import gates_of

_EVERY_S = 0.2
Json = dict[str, Any]


class Journal:
    """A context manager: changes are printed inside, with the seconds since its beginning."""

    def __init__(self, cluster: ApiCluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._told: dict[str, str] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_EVERY_S):
            kinds = "finetunejobs,workloads,pods"
            text = self._cluster.kubectl("-n", self._namespace, "get", kinds, "-o", "json")
            found = {_name(each): _in_short(each) for each in json.loads(text)["items"]}
            gone = dict.fromkeys(self._told.keys() - found.keys(), "gone")
            for name, words in (found | gone).items():
                if self._told.get(name) != words:
                    say(f"{time.monotonic() - self._began:6.1f} s  {name}: {words}")
            self._told = found


def _name(document: Json) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def _in_short(document: Json) -> str:
    status = document.get("status") or {}
    told = {each["type"]: each for each in status.get("conditions") or []}
    if document["kind"] == "FineTuneJob":
        admitted = told.get("Admitted", {})
        waits = f": {admitted['message']}" if admitted.get("reason") == "WaitsInQueue" else ""
        return f"{status.get('phase')}, Admitted {admitted.get('status')}{waits}"
    if document["kind"] == "Workload":
        true = [type_ for type_ in told if told[type_]["status"] == "True"]
        return ", ".join(sorted(true)) or "waits"
    if gates := gates_of(document):
        return f"held by {gates[0]}"
    is_leaving = "deletionTimestamp" in document["metadata"]
    return f"{status.get('phase')}{', told to leave' if is_leaving else ''}"
