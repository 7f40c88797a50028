"""What lending idle devices to a fine-tune job costs serving, live, and how much of them it uses.

    python -m hack.cluster fake-gpus 4        # the node counts four devices; nothing is behind them
    python -m benchmarks.lending_live --api-key mz-... [--rounds 2]
        [--stretches 180:0.3 90:2.5 30:0.3] [--ttft-ms 1000] [--itl-ms 100]

Needs the cluster and the claims that `make demo` leaves, and kubectl that reaches them. A leg is a
fresh deployment of one to two replicas under requests that come at random, one `SECONDS:RATE` after
the other, whatever the answers take; legs go in turns without a job and with a LoRA job that
borrows the three devices beside the first replica, and has to leave when the second is wanted. Both
legs of a round have the same requests at the same times.

Where a device is a core's name only, the job would compute on what serving is to have, which it
would not on a node with GPUs. So a replica and the trainer have one thread each, and by their CPU
requests a replica gets its core 25 times before the trainer. What is left of the trainer beside
serving (memory bandwidth, caches, a step's turn on a core) is in the figures.

A request meets its objective when its first token and its mean time between tokens are within the
limits; one that is refused or cut does not. Attainment is told at multiples of the limits too. A
leg is too short for the five minutes after which the autoscaler takes a replica away and the job
comes back; a last stretch of 420 seconds shows that. Of a job that is at work when a leg ends, the
lease ends by `suspend`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.borrowing import borrowing_job, scaled_deployment
from benchmarks.control_plane import Api, beside
from benchmarks.deployment import LIMIT_S, Deployment, apply, gateway_url
from benchmarks.lending_legs import Leg, Size, summary
from benchmarks.lent_time import Leases
from benchmarks.load_generator import Client, open_session
from benchmarks.open_loop import Answer, Limits, Stretch, ask, draw_arrivals, play
from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows
from benchmarks.story import Story
from benchmarks.stream_counter import WHOLE
from mizzen.operator.desired.labels import DEPLOYMENT, JOB
from mizzen.operator.kube.connect import open_client

VOCABULARY = 49152  # SmolLM2's
SHORTEST, LONGEST = 32, 128  # tokens of a prompt
ALONE = 6  # requests, one after the other, before a leg; the first of them warms up
# A limit of one and a half cores makes the runtime compute with one thread, and leaves its server
# the rest: at one core it would be stopped in the middle of a step.
REPLICA_CPU = {"resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "1500m"}}}
TRAINER_CPU = {
    "resources": {"requests": {"cpu": "20m"}},
    "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
}
# More steps than a leg has time for; a micro-batch is how long a notice may have to wait.
HYPERPARAMETERS = {"epochs": 1000, "maxSteps": 100000, "batchSize": 4, "microBatch": 2}
Json = dict[str, Any]


class Witness:
    """Sees a leg's resources change, and tells of it."""

    def __init__(self, leg: Leg) -> None:
        self.story = Story()
        self.leases = Leases(leg.name, lambda: self.story.now_s)
        self._leg = leg

    def see_pod(self, kind: str, pod: Json) -> None:
        """Take an event of the pods' watch."""
        labels = pod["metadata"].get("labels", {})
        self.leases.see_pod(kind, pod)
        if self._leg.name in (labels.get(DEPLOYMENT), labels.get(JOB)):
            self._tell("Pod", kind, pod)

    def see_resource(self, resource_kind: str, kind: str, resource: Json) -> None:
        """Take an event of the deployments' or the jobs' watch."""
        if resource["metadata"]["name"] != self._leg.name:
            return
        self._tell(resource_kind, kind, resource)
        status = resource.get("status") or {}
        if wanted := (status.get("scaling") or {}).get("desired"):
            serving = status.get("readyReplicas") or 0
            last = self._leg.sizes[-1] if self._leg.sizes else None
            if last is None or (last.wanted, last.serving) != (wanted, serving):
                self._leg.sizes.append(Size(self.story.now_s, wanted, serving))

    def _tell(self, resource_kind: str, kind: str, resource: Json) -> None:
        if kind == "DELETED":
            self.story.tell_gone(f"{resource_kind}/{resource['metadata']['name']}")
        else:
            self.story.tell({"kind": resource_kind, **resource})


async def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until watches have shown something.

    Raises:
        RuntimeError: they did not.
    """
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {LIMIT_S} s")
        await asyncio.sleep(0.2)


async def remove(cluster: Deployment) -> None:
    """Delete the deployment and the job of this name, and wait until their pods are gone."""
    for kind in ("ftj", "llmd"):
        await cluster.kubectl("delete", kind, cluster.name, "--ignore-not-found")
    for label in (JOB, DEPLOYMENT):
        await cluster.kubectl(
            *("wait", "--for=delete", "pods", "-l", f"{label}={cluster.name}"),
            f"--timeout={LIMIT_S}s",
        )


async def run_leg(leg: Leg, api: Api, url: str, options: argparse.Namespace) -> None:
    """Do one leg, and leave nothing of it in the cluster."""
    cluster, witness = Deployment(leg.name, options.namespace), Witness(leg)
    story = witness.story
    group = f"/apis/mizzen.dev/v1alpha1/namespaces/{options.namespace}"
    see_job, see_deployment = (
        partial(witness.see_resource, kind) for kind in ("FineTuneJob", "LLMDeployment")
    )
    try:
        async with (
            open_session(options.api_key) as session,
            beside(
                api.watch(f"/api/v1/namespaces/{options.namespace}/pods", witness.see_pod),
                api.watch(f"{group}/llmdeployments", see_deployment),
                api.watch(f"{group}/finetunejobs", see_job),
                witness.leases.follow_steps(),
            ),
        ):
            story.say(f"-- leg {leg.name}")
            await apply(cluster, scaled_deployment(leg.name, most=2,
                concurrency=options.concurrency, podTemplatePatch=REPLICA_CPU))  # fmt: skip
            await cluster.settle(1)
            client = Client(session, url, leg.name)
            leg.alone = await ask_alone(client, options.output_tokens)
            if leg.lends:
                await apply(cluster, borrowing_job(leg.name, of=leg.name,
                    hyperparameters=HYPERPARAMETERS, podTemplatePatch=TRAINER_CPU))  # fmt: skip
            arrivals = draw_arrivals(options.stretches, seed=leg.number)
            prompts = draw_prompts(len(arrivals), seed=leg.number)
            story.say(f"-- {len(arrivals)} requests begin")
            leg.begun_s = story.now_s
            leg.answers = await play(client, arrivals, prompts,
                output_tokens=options.output_tokens, say=story.say)  # fmt: skip
            story.say("-- all requests are answered")
            if leg.lends:
                await cluster.kubectl(
                    *("patch", "ftj", leg.name, "--type=merge", "-p", '{"spec":{"suspend":true}}')
                )
                await until(lambda: not witness.leases.open, "the job's last yield")
            leg.leases = witness.leases.all
    finally:
        await remove(cluster)


async def ask_alone(client: Client, output_tokens: int) -> list[Answer]:
    """Return how requests fare one after the other, but for the first, which warms up.

    Raises:
        RuntimeError: one was not answered.
    """
    prompts = draw_prompts(ALONE, seed=0)
    answers = [await ask(client, prompt, output_tokens, print) for prompt in prompts]
    if any(answer.end != WHOLE for answer in answers):
        raise RuntimeError(f"{client.model} does not answer at {client.url}: see above")
    return answers[1:]


def draw_prompts(count: int, *, seed: int) -> list[list[int]]:
    """Return prompts of modest length that no other seed has."""
    return random_prompts(
        count, shortest=SHORTEST, longest=LONGEST, vocab_size=VOCABULARY, seed=seed
    )


async def run(options: argparse.Namespace) -> list[Leg]:
    """Do all legs in turns, and print a line of each; a signal ends it as an error would."""
    task = asyncio.current_task()
    assert task is not None
    for sent in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sent, task.cancel)
    limits = Limits(options.ttft_ms / 1e3, options.itl_ms / 1e3)
    url = options.url or await gateway_url(Deployment("", options.namespace))
    legs: list[Leg] = []
    rows = Rows(f"Attainment of {options.ttft_ms:g} ms and {options.itl_ms:g} ms, by leg")
    async with await open_client() as client:
        for number in range(1, options.rounds + 1):
            for lends in (False, True):
                leg = Leg(number, lends)
                await run_leg(leg, Api(client), url, options)
                rows.add(leg.row(limits))
                legs.append(leg)
    rows.print_table()
    print(*summary(legs, limits), sep="\n")
    return legs


def main() -> None:
    """Print the story of each leg, a table, and what lending came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--namespace", default="quickstart")
    parser.add_argument("--url", default="", help="the gateway; found in mizzen-system otherwise")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--stretches", type=Stretch.parse, nargs="+", metavar="SECONDS:RATE",
        default=[Stretch(180, 0.3), Stretch(90, 2.5), Stretch(30, 0.3)],
        help="requests per second for so long, one after the other",
    )  # fmt: skip
    parser.add_argument("--concurrency", type=float, default=3, help="requests per replica")
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--ttft-ms", type=float, default=1000, help="to the first token")
    parser.add_argument("--itl-ms", type=float, default=100, help="mean of a request's")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
