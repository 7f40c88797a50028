"""Rollouts: answers of a policy in training, for its trainer and nobody else.

The trainer pushes the policy, an adapter, and asks for answers of exactly that one: a policy is
called by the digest of its bytes, so that no other version can answer in its place. Work for a
trainer waits for everybody else's.
"""

import asyncio
import io
import time
import uuid
import zipfile
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request
from starlette.types import ASGIApp

from mizzen.runtime.engine.api import (
    BACKGROUND_PRIORITY,
    GenerationRequest,
    SamplingParams,
    TokenOutput,
)
from mizzen.runtime.engine.errors import UnknownAdapterError
from mizzen.runtime.errors import MizzenError
from mizzen.runtime.server.access import Access
from mizzen.runtime.server.errors import ApiError, from_validation, invalid, to_api_error
from mizzen.runtime.server.routes import GuardedRoute, json_response, read_body
from mizzen.runtime.server.service import Service
from mizzen.runtime.train.digest import mark_weights, policy_name

_POLICY_BYTES = 1 << 30
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ORIGIN_FILE = "policy.json"
_SHARE = 4  # of the sequences that run at once, rollouts are at most one in so many
_KEEP_S = 900.0  # a trainer that was killed takes nothing back


class Origin(BaseModel):
    """What a policy is of: whose it is, and the model that it is an adapter of."""

    model_config = ConfigDict(extra="forbid")

    job: str = Field(min_length=1, max_length=512)
    weights: str
    vocabulary: str


class DrawRequest(BaseModel):
    """Body of POST /rollouts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    policy: str = Field(min_length=1)
    prompts: list[list[Annotated[int, Field(ge=0)]]] = Field(min_length=1, max_length=256)
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]]
    max_tokens: int = Field(ge=1, lt=2**31)
    temperature: float = Field(gt=0, le=100)

    @model_validator(mode="after")
    def _has_a_seed_for_each(self) -> "DrawRequest":
        if len(self.seeds) != len(self.prompts):
            raise ValueError("seeds must be as many as prompts")
        return self


@dataclass(slots=True)
class _Policy:
    name: str
    swaps: int  # of weights, before those it was found to belong to
    used_at: float


class Rollouts:
    """The policies that are here, at most one of each job."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._policies: dict[str, _Policy] = {}
        self._ends: dict[str, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(max(1, service.config.max_num_seqs // _SHARE))

    async def take(self, body: bytes) -> str:
        """Answer by this policy from now on, and no more by the job's last one; return its name.

        Raises:
            ApiError: it is no policy, or of another model than the one that is served.
        """
        if self._service.config.nnodes > 1:
            # The other pods could not read what is unpacked here.
            raise invalid(
                None,
                "Rollouts need a replica of one pod. Name a deployment with "
                "spec.parallelism.nodes 1.",
            )
        name = policy_name(body)
        with TemporaryDirectory(prefix="policy-") as folder:
            origin = await asyncio.to_thread(_unpack, body, Path(folder))
            async with self._service.change_lock:
                swaps, weights = self._service.swaps, self._service.weights
                await asyncio.to_thread(self._check_origin, origin, weights)
                # First the old one goes: there may be no room for two.
                await self._withdraw(origin.job)
                try:
                    await self._service.engine.load_adapter(name, Path(folder))
                except MizzenError as error:
                    raise to_api_error(error) from error
                self._policies[origin.job] = _Policy(name, swaps, time.monotonic())
        if origin.job not in self._ends:
            self._ends[origin.job] = asyncio.create_task(self._forget_unused(origin.job))
        return name

    async def give_back(self, job: str) -> str | None:
        """Answer for this job no more; return the name of the policy it had, None if it had none.

        Raises:
            ApiError: the engine is gone.
        """
        async with self._service.change_lock:
            name = policy.name if (policy := self._policies.get(job)) else None
            try:
                await self._withdraw(job)
            except MizzenError as error:
                raise to_api_error(error) from error
        return name

    async def draw(self, asked: DrawRequest) -> list[dict[str, object]]:
        """Return the policy's answer to each prompt, with the probability that each token had.

        Raises:
            ApiError: that policy is not here (404), or whatever the engine had against it.
        """
        policy = self._named(asked.policy)
        policy.used_at = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._answer(asked, prompt, seed))
                    for prompt, seed in zip(asked.prompts, asked.seeds, strict=True)
                ]
        except* Exception as errors:
            raise to_api_error(errors.exceptions[0]) from None
        policy.used_at = time.monotonic()
        return [task.result() for task in tasks]

    async def _answer(self, asked: DrawRequest, prompt: list[int], seed: int) -> dict[str, object]:
        sampling = SamplingParams(
            temperature=asked.temperature,
            seed=seed,
            max_tokens=asked.max_tokens,
            logprobs=0,
            logprobs_as_drawn=True,
        )
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            adapter=asked.policy,
            priority=BACKGROUND_PRIORITY,
        )
        token_ids: list[int] = []
        log_probs: list[float] = []
        async with self._room:
            outputs = self._service.engine.generate(request)
            async with aclosing(cast("AsyncGenerator[TokenOutput, None]", outputs)):
                async for output in outputs:
                    if output.finish_reason == "abort":
                        raise ApiError(503, "The replica is stopping.", code="aborted")
                    token_ids += output.token_ids
                    log_probs += [entry.logprob for entry in output.logprobs]
        return {"token_ids": token_ids, "log_probs": log_probs}

    def _named(self, name: str) -> _Policy:
        for policy in self._policies.values():
            # Weights that were swapped since are another model.
            if policy.name == name and policy.swaps == self._service.swaps:
                return policy
        raise ApiError(
            404, "This policy is not here, or no more. Push it.", code="policy_not_found"
        )

    def _check_origin(self, origin: Origin, weights: Path) -> None:
        pairs = {
            "weights": (origin.weights, mark_weights(weights)),
            "vocabulary": (origin.vocabulary, self._service.engine.tokenizer.vocabulary_digest),
        }
        for what, (trained, served) in pairs.items():
            if trained != served:
                raise ApiError(
                    409,
                    f"The job's base model has a {what} digest of {trained}, and the model that "
                    f"is served one of {served}. Name a deployment that serves the job's base "
                    "model.",
                    code="policy_of_another_model",
                )

    async def _withdraw(self, job: str) -> None:
        if (policy := self._policies.pop(job, None)) is not None:
            with suppress(UnknownAdapterError):
                await self._service.engine.unload_adapter(policy.name)

    async def _forget_unused(self, job: str) -> None:
        while (policy := self._policies.get(job)) is not None:
            left_s = policy.used_at + _KEEP_S - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            async with self._service.change_lock:
                if self._policies.get(job) is policy:
                    with suppress(MizzenError):  # an engine that is gone has none either
                        await self._withdraw(job)
        del self._ends[job]


def rollout_routes(service: Service) -> list[GuardedRoute]:
    """Return a trainer's routes: on the users' port, which its pod reaches, but not for users."""
    rollouts = Rollouts(service)
    return [
        GuardedRoute("POST", "/rollouts/policy", partial(_push, rollouts), Access.ADMIN),
        GuardedRoute("DELETE", "/rollouts/policy", partial(_give_back, rollouts), Access.ADMIN),
        GuardedRoute(
            "POST", "/rollouts", partial(_draw, service, rollouts), Access.ADMIN, body=DrawRequest
        ),
    ]


async def _push(rollouts: Rollouts, request: Request) -> ASGIApp:
    """Take a policy in training: a zip of PEFT's two files and policy.json, which says of what."""
    body = await read_body(request, limit=_POLICY_BYTES)
    return json_response({"policy": await rollouts.take(body)})


async def _give_back(rollouts: Rollouts, request: Request) -> ASGIApp:
    """Forget the policy of the job that the query names: its trainer has ended."""
    job = request.query_params.get("job")
    if not job:
        raise invalid("job", "Name the job whose policy is to be forgotten, as in ?job=team/tune.")
    return json_response({"policy": await rollouts.give_back(job)})


async def _draw(service: Service, rollouts: Rollouts, request: Request) -> ASGIApp:
    """Draw answers of a pushed policy, when nobody else wants the model."""
    body = await read_body(request, limit=service.config.max_body_bytes)
    try:
        asked = DrawRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    return json_response({"policy": asked.policy, "answers": await rollouts.draw(asked)})


def _unpack(body: bytes, folder: Path) -> Origin:
    """Write a policy's files into a folder.

    Raises:
        ApiError: the body is not what a trainer sends.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            sizes = [archive.getinfo(name).file_size for name in (*_FILES, _ORIGIN_FILE)]
            if sum(sizes) > _POLICY_BYTES:
                raise ValueError("its files are too large")
            for name in _FILES:
                (folder / name).write_bytes(archive.read(name))
            return Origin.model_validate_json(archive.read(_ORIGIN_FILE))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise invalid(
            None,
            f"A policy is a zip file of {', '.join(_FILES)} and {_ORIGIN_FILE}: {error}.",
            code="not_a_policy",
        ) from error
