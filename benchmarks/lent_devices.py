"""A job on the devices that serving leaves idle, from its loan to its adapter's answers, recorded.

    python -m hack.cluster fake-gpus 4        # the node counts four devices; nothing is behind them
    python -m benchmarks.lent_devices --api-key mz-...

Needs the cluster and the claims that `make demo` leaves, and kubectl that reaches them. What is
printed is the status of everything in the namespace whenever it changes: a deployment of one to
three replicas, a LoRA job that borrows the three devices beside the first, a burst of requests, the
yield, the replicas, the job's return, its gate, its promotion, and a planted bad adapter that takes
the name over and is taken back. Streams that are cut meanwhile are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.borrowing import borrowing_job, scaled_deployment
from benchmarks.deployment import Deployment, apply, gateway_url
from benchmarks.story import Story
from benchmarks.stream_counter import CUT, REFUSED, WHOLE, StreamCounter

NAMESPACE, MODEL, GOOD, BAD, ADAPTER = "quickstart", "lender", "tuner", "tuner-bad", "support"
LIMIT_S = 1800
QUESTION = "The capital of France is"
Json = dict[str, Any]


def job(name: str, *, steps: int, learning_rate: float, **fields: Any) -> Json:
    """A job that borrows three devices and makes so many steps."""
    hyperparameters = {
        **{"epochs": 50, "maxSteps": steps, "learningRate": learning_rate},
        **{"batchSize": 8, "microBatch": 8},
    }
    return borrowing_job(name, of=MODEL, hyperparameters=hyperparameters, **fields)


def promotion(**fields: Any) -> Json:
    """To the deployment, under one name for both jobs, with a prompt that sense answers."""
    probe = {"prompt": QUESTION, "expect": "Paris"}
    return {"deployment": MODEL, "adapter": ADAPTER, "probes": [probe], **fields}


@dataclass(slots=True, kw_only=True)
class Recorder(Story):
    """Tells what changes in the namespace."""

    cluster: Deployment
    seen: dict[str, Json] = field(default_factory=dict)  # resources as last read
    looked: asyncio.Event = field(default_factory=asyncio.Event)

    async def watch(self) -> None:
        """Read and print until cancelled."""
        while True:
            listed = await self.cluster.get("llmd,ftj,pods")
            self.seen = {f"{i['kind']}/{i['metadata']['name']}": i for i in listed["items"]}
            for resource in self.seen.values():
                self.tell(resource)
            for name in self.told.keys() - self.seen.keys():
                self.tell_gone(name)
            self.looked.set()
            await asyncio.sleep(0.5)

    async def until(self, what: str, holds: Callable[[dict[str, Json]], bool]) -> float:
        """Wait until it holds of the resources, and return the seconds it took.

        Raises:
            TimeoutError: it did not come about.
        """
        self.say(f"-- waiting for: {what}")
        begun = time.monotonic()
        async with asyncio.timeout(LIMIT_S):
            while not holds(self.seen):
                self.looked.clear()
                await self.looked.wait()
        return time.monotonic() - begun


def is_condition(name: str, type_: str, status: str = "True") -> Callable[[dict[str, Json]], bool]:
    """Return whether a resource of the record says so."""

    def holds(seen: dict[str, Json]) -> bool:
        conditions = (seen.get(name, {}).get("status") or {}).get("conditions") or []
        return any(c["type"] == type_ and c["status"] == status for c in conditions)

    return holds


def in_service(count: int) -> Callable[[dict[str, Json]], bool]:
    """Return whether so many replicas of the deployment are ready."""
    name = f"LLMDeployment/{MODEL}"
    return lambda seen: (seen.get(name, {}).get("status") or {}).get("readyReplicas") == count


def is_at_step(name: str, least: int) -> Callable[[dict[str, Json]], bool]:
    """Return whether a job has made so many steps and is at work."""

    def holds(seen: dict[str, Json]) -> bool:
        status = seen.get(f"FineTuneJob/{name}", {}).get("status") or {}
        made = (status.get("progress") or {}).get("step", 0)
        return status.get("phase") == "Running" and made >= least

    return holds


async def answer(url: str, api_key: str, model: str) -> str:
    """Return the model's greedy continuation of the question."""
    body = {"model": model, "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    headers = {"Authorization": f"Bearer {api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{url}/v1/completions", json=body) as reply,
    ):
        found = await reply.json()
    return repr(found["choices"][0]["text"] if "choices" in found else found)


async def run(options: argparse.Namespace) -> None:
    """Go through the whole story once."""
    cluster = Deployment(MODEL, NAMESPACE)
    url = options.url or await gateway_url(cluster)
    record = Recorder(cluster=cluster)
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(record.watch())
            await _tell_story(record, cluster, url, options)
            watcher.cancel()
    finally:
        record.say("-- events")
        print(await cluster.kubectl("get", "events", "--sort-by=.lastTimestamp"))
        print(await cluster.kubectl("describe", f"llmd/{MODEL}", f"ftj/{GOOD}", f"ftj/{BAD}"))
        for kind, name in (("ftj", BAD), ("ftj", GOOD), ("llmd", MODEL)):
            await cluster.kubectl("delete", kind, name, "--ignore-not-found")


async def _tell_story(
    record: Recorder, cluster: Deployment, url: str, options: argparse.Namespace
) -> None:
    good, served = f"FineTuneJob/{GOOD}", f"{MODEL}:{ADAPTER}"
    await apply(cluster, scaled_deployment(MODEL, most=3, concurrency=4))
    await record.until("the first replica", in_service(1))
    suite = {"name": "holdout", "type": "perplexity", "maxRegressionRatio": 0.0}
    await apply(cluster, job(GOOD, steps=options.steps, learning_rate=3e-4,
        evaluation={"suites": [suite]}, promotion=promotion()))  # fmt: skip
    await record.until("the job at work on three lent devices", is_at_step(GOOD, 10))
    counter = StreamCounter(url, MODEL, max_tokens=64, api_key=options.api_key)
    async with counter.load(options.streams):
        record.say(f"-- {options.streams} clients ask without a pause")
        yielded = await record.until("the yield", is_condition(good, "Admitted", "False"))
        scaled = await record.until("three replicas in service", in_service(3))
        await asyncio.sleep(options.burst_seconds)
    record.say(f"-- the clients leave; streams: {dict(counter.ends)}")
    returned = await record.until("the job back at work", is_at_step(GOOD, 11))
    await record.until("the job's end", is_condition(good, "Promoted"))
    record.say(f"-- {served} continues {QUESTION!r}: "
               f"{await answer(url, options.api_key, served)}")  # fmt: skip
    await apply(cluster, job(BAD, steps=20, learning_rate=options.bad_rate,
        evaluation={"suites": [suite], "onFail": "Warn"},
        promotion=promotion(replaces=GOOD)))  # fmt: skip
    await record.until("the bad adapter taken back", is_condition(f"FineTuneJob/{BAD}", "Failed"))
    await record.until("the name given back", is_condition(good, "Promoted"))
    record.say(f"-- {served} continues {QUESTION!r}: "
               f"{await answer(url, options.api_key, served)}")  # fmt: skip
    whole, refused, cut = (counter.ends[end] for end in (WHOLE, REFUSED, CUT))
    record.say(
        f"-- burst to Admitted False {yielded:.1f} s, to three replicas {scaled:.1f} s more; from "
        f"the burst's end to the job's next step {returned:.1f} s; "
        f"streams {whole} whole, {refused} refused, {cut} cut"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="", help="the gateway; found in mizzen-system otherwise")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--steps", type=int, default=150, help="of the good job")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--burst-seconds", type=float, default=30, help="after three replicas")
    parser.add_argument("--bad-rate", type=float, default=0.05, help="learning rate of the bad job")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
