"""Answers drawn by replicas: of the policy as it is, by whoever is there, and for no user."""

import asyncio
import io
import re
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.errors import AdapterLoadError
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import TrainableLora
from mizzen.runtime.model.lora.adapter import LoraConfig
from mizzen.runtime.server import rollouts
from mizzen.runtime.train.digest import mark_weights
from mizzen.runtime.train.errors import RolloutRefusedError
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.methods.token_loss import log_probs_by_sample
from mizzen.runtime.train.roles.fleet import Fleet, Policy
from mizzen.runtime.train.roles.served import pack_policy
from mizzen.runtime.train.samples import Prompt, joined
from mizzen.runtime.train.stop import StopFlag
from tests.fixtures.runtime_server import Running, eventually, running_tiny_model
from tests.fixtures.train_runs import Job, read_curve, run, start, write_job, write_prompts

PROMPTS = [np.arange(20 + at, 32 + at, dtype=np.int32) for at in range(20)]
RULES = {"max_tokens": 6, "temperature": 0.7}
ASKED = [{"prompt": ids.tolist(), "seed": at} for at, ids in enumerate(PROMPTS)]
TOKEN = {"Authorization": "Bearer secret"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("replica")
    (folder / "token").write_text("secret\n")
    async with running_tiny_model(
        folder, own_process=True, admin_token_file=folder / "token", max_loras=2
    ) as server:
        yield server


@dataclass
class Learner:
    """A policy here, to compare with what the replica makes of it."""

    server: Running

    def __post_init__(self) -> None:
        self.model = Path(self.server.service.config.model_path)
        self.decoder = load_decoder(self.model, dtype=torch.float32)
        self.lora = TrainableLora(self.decoder, LoraConfig(rank=4, alpha=8.0)).eval()
        self.origin = {
            "job": "test/learner",
            "weights": mark_weights(self.model),
            "vocabulary": self.server.service.engine.tokenizer.vocabulary_digest,
        }

    def step(self) -> Policy:
        with torch.no_grad():
            for parameter in self.lora.parameters():
                parameter.normal_(std=0.3)
        return pack_policy(self.lora, self.origin)

    def log_probs(self, answers: list[Any], lora: TrainableLora | None) -> np.ndarray:
        samples = [
            joined(Prompt(ids), answer["token_ids"])
            for ids, answer in zip(PROMPTS, answers, strict=True)
        ]
        temperature = RULES["temperature"]
        found = log_probs_by_sample(
            self.decoder, samples, lora, at_once=AtOnce(4), temperature=temperature
        )
        return np.concatenate(found)


def told(answers: list[Any]) -> np.ndarray:
    return np.concatenate([answer["log_probs"] for answer in answers])


def fleet_of(url: str, **options: Any) -> Fleet:
    return Fleet(url, **{"token": "secret", "stop": StopFlag(), **options})


@pytest.mark.asyncio(loop_scope="module")
async def test_answers_are_of_the_newest_policy_with_its_own_probabilities(
    replica: Running,
) -> None:
    learner, fleet = Learner(replica), fleet_of(replica.url)
    for _ in range(2):
        policy = learner.step()
        answers = await asyncio.to_thread(fleet.draw, policy, ASKED, RULES)
        assert {len(answer["token_ids"]) for answer in answers} <= set(range(1, 7))
        expected = learner.log_probs(answers, learner.lora)
        np.testing.assert_allclose(told(answers), expected, atol=1e-3)
        assert np.abs(told(answers) - learner.log_probs(answers, None)).max() > 0.1


@pytest.mark.asyncio(loop_scope="module")
async def test_seeds_alone_decide_what_is_drawn(replica: Running) -> None:
    policy, fleet = Learner(replica).step(), fleet_of(replica.url)
    whole = await asyncio.to_thread(fleet.draw, policy, ASKED, RULES)
    part = await asyncio.to_thread(fleet.draw, policy, ASKED[7:9], RULES)
    assert [a["token_ids"] for a in part] == [a["token_ids"] for a in whole[7:9]]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_replica_that_lost_the_policy_is_given_it_again(replica: Running) -> None:
    policy, fleet = Learner(replica).step(), fleet_of(replica.url)
    before = await asyncio.to_thread(fleet.draw, policy, ASKED[:2], RULES)
    await replica.service.engine.unload_adapter(policy.name)
    after = await asyncio.to_thread(fleet.draw, policy, ASKED[:2], RULES)
    assert [a["token_ids"] for a in after] == [a["token_ids"] for a in before]
    np.testing.assert_allclose(told(after), told(before), atol=1e-3)


@pytest.mark.asyncio(loop_scope="module")
async def test_where_no_adapter_fits_any_more_the_job_is_told(
    replica: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> None:
        raise AdapterLoadError("1 adapters may be loaded. Raise --max-loras.")

    monkeypatch.setattr(replica.service.engine, "load_adapter", refuse)
    with pytest.raises(RolloutRefusedError, match="Raise --max-loras"):
        await asyncio.to_thread(
            fleet_of(replica.url).draw, Learner(replica).step(), ASKED[:1], RULES
        )


@pytest.mark.asyncio(loop_scope="module")
async def test_an_older_version_is_not_answered_with(replica: Running) -> None:
    learner = Learner(replica)
    first, second = learner.step(), learner.step()
    for policy in (first, second):
        answer = await replica.http.post("/rollouts/policy", content=policy.body, headers=TOKEN)
        assert answer.json() == {"policy": policy.name}
    question = {"policy": first.name, "prompts": [[1, 2]], "seeds": [0], **RULES}
    answer = await replica.http.post("/rollouts", json=question, headers=TOKEN)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "policy_not_found"


@pytest.mark.asyncio(loop_scope="module")
async def test_no_user_is_answered_by_a_policy(replica: Running) -> None:
    asked = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    before = await replica.http.post("/v1/completions", json={"model": "tiny", **asked})
    policy = Learner(replica).step()
    await asyncio.to_thread(fleet_of(replica.url).draw, policy, ASKED[:1], RULES)
    after = await replica.http.post("/v1/completions", json={"model": "tiny", **asked})
    assert after.json()["choices"] == before.json()["choices"]
    for name in (policy.name, f"tiny:{policy.name}"):
        answer = await replica.http.post("/v1/completions", json={"model": name, **asked})
        assert answer.status_code == 404
    models = (await replica.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["tiny"]
    assert (await replica.admin.get("/adapters", headers=TOKEN)).json()["adapters"] == []


@pytest.mark.parametrize("what", ["weights", "vocabulary"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_policy_of_another_model_is_refused_with_both_digests(
    replica: Running, what: str
) -> None:
    learner = Learner(replica)
    served, learner.origin[what] = learner.origin[what], "f" * 64
    draw = asyncio.to_thread(fleet_of(replica.url).draw, learner.step(), ASKED[:1], RULES)
    with pytest.raises(RolloutRefusedError, match=what) as caught:
        await draw
    assert set(re.findall(r"[0-9a-f]{64}", str(caught.value))) == {served, "f" * 64}


@pytest.mark.asyncio(loop_scope="module")
async def test_swapped_weights_are_another_model_to_a_policy(
    replica: Running, tmp_path: Path
) -> None:
    learner, fleet = Learner(replica), fleet_of(replica.url)
    policy = learner.step()
    await asyncio.to_thread(fleet.draw, policy, ASKED[:1], RULES)
    await replica.service.load_weights(halved(tmp_path / "other"))
    with pytest.raises(RolloutRefusedError, match="weights digest"):
        await asyncio.to_thread(fleet.draw, policy, ASKED[:1], RULES)
    await replica.service.load_weights(learner.model)
    await asyncio.to_thread(fleet.draw, policy, ASKED[:1], RULES)


def halved(folder: Path) -> Path:
    """Write the same model with other weights."""
    path = write_tiny_model(folder) / "model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(path).items()}, path)
    return folder


def zipped(*, compression: int = zipfile.ZIP_STORED, **files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return content.getvalue()


def spoilt(body: bytes, *, at: bytes, by: bytes) -> bytes:
    assert at in body
    return body.replace(at, by)


SQUEEZED = zipped(
    compression=zipfile.ZIP_DEFLATED,
    adapter_config__json="{}" * 99,
    adapter_model__safetensors="",
    policy__json="{}",
)
NO_POLICIES = {
    "text": b"hello",
    # A flag in the heads of its files, and a first byte that begins no block.
    "an encrypted zip": spoilt(
        spoilt(SQUEEZED, at=b"PK\x03\x04\x14\0\0", by=b"PK\x03\x04\x14\0\1"),
        at=b"PK\x01\x02\x14\x03\x14\0\0",
        by=b"PK\x01\x02\x14\x03\x14\0\1",
    ),
    "a broken zip": spoilt(SQUEEZED, at=b"config.json\xab", by=b"config.json\xff"),
    "an empty zip": zipped(),
    "a zip that does not say of what it is": zipped(
        adapter_config__json="{}", adapter_model__safetensors="", policy__json="{}"
    ),
}


@pytest.mark.parametrize("body", NO_POLICIES.values(), ids=NO_POLICIES)
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_no_policy_is_refused(replica: Running, body: bytes) -> None:
    answer = await replica.http.post("/rollouts/policy", content=body, headers=TOKEN)
    assert answer.status_code == 400
    assert "policy.json" in answer.json()["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_every_prompt_needs_a_seed(replica: Running) -> None:
    question = {"policy": "policy:1", "prompts": [[1], [2]], "seeds": [0], **RULES}
    answer = await replica.http.post("/rollouts", json=question, headers=TOKEN)
    assert answer.status_code == 400
    assert "seeds must be as many as prompts" in answer.json()["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_replica_of_several_pods_takes_no_policy(
    replica: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replica.service.config.model_copy(update={"nnodes": 2})
    monkeypatch.setattr(replica.service, "config", config)
    with pytest.raises(RolloutRefusedError, match="replica of one pod"):
        await asyncio.to_thread(
            fleet_of(replica.url).draw, Learner(replica).step(), ASKED[:1], RULES
        )


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
async def test_two_ranks_draw_of_the_newest_policy(tmp_path: Path, kind: str) -> None:
    ranks = {f"{kind}_parallel_size": 2}
    async with running_tiny_model(tmp_path, own_process=True, max_loras=2, **ranks) as server:
        learner, fleet = Learner(server), fleet_of(server.url)
        for _ in range(3):  # there is room for two
            policy = learner.step()
            answers = await asyncio.to_thread(fleet.draw, policy, ASKED, RULES)
            expected = learner.log_probs(answers, learner.lora)
            np.testing.assert_allclose(told(answers), expected, atol=1e-3)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_policy_that_nobody_uses_gives_its_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "_KEEP_S", 0.0)
    async with running_tiny_model(tmp_path) as server:
        policy = Learner(server).step()
        await server.http.post("/rollouts/policy", content=policy.body)
        await eventually(lambda: server.service.engine.adapters() == [])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_job_that_ended_gives_its_room_to_another_at_once(replica: Running) -> None:
    fleet = fleet_of(replica.url)
    learner = Learner(replica)
    for job in ("test/first", "test/second", "test/third"):  # there is room for two
        learner.origin["job"] = job
        await asyncio.to_thread(fleet.draw, learner.step(), ASKED[:1], RULES)
        await asyncio.to_thread(fleet.close, job)
        assert await taken_back(replica, job) is None


async def taken_back(replica: Running, job: str) -> str | None:
    """Return the policy that the replica had of a job."""
    answer = await replica.http.delete("/rollouts/policy", params={"job": job}, headers=TOKEN)
    assert answer.status_code == 200
    return answer.json()["policy"]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_policy_of_a_job_that_was_killed_can_be_taken_back(replica: Running) -> None:
    policy = Learner(replica).step()
    await asyncio.to_thread(fleet_of(replica.url).draw, policy, ASKED[:1], RULES)
    assert await taken_back(replica, "test/learner") == policy.name
    assert await taken_back(replica, "test/learner") is None


@pytest.mark.asyncio(loop_scope="module")
async def test_whoever_ends_a_policy_names_its_job(replica: Running) -> None:
    answer = await replica.http.delete("/rollouts/policy", headers=TOKEN)
    assert answer.status_code == 400
    assert "?job=team/tune" in answer.json()["error"]["message"]


def rl_job(root: Path, method: str, url: str, **overrides: Any) -> Job:
    root.mkdir(parents=True, exist_ok=True)
    rl = {
        "rewards": [{"type": "regex", "pattern": f"[{span}]"} for span in ("a-m", "n-z", "A-M")],
        "max_new_tokens": 6,
        "group_size": 6,
        "rollout": {"url": url},
    }
    prompts = write_prompts(root / "q.jsonl")
    document: dict[str, Any] = {
        "method": method,
        "rl": rl,
        "datasets": [{"name": "questions", "path": str(prompts)}],
        "hyperparameters": {"max_steps": 3, "batch_size": 4, "micro_batch": 12},
        "evaluation": {
            "suites": [{"name": "worth", "type": "reward", "max_regression_ratio": 10.0}]
        },
    }
    return write_job(root, **{**document, **overrides})


@pytest.mark.parametrize("method", ["grpo", "ppo"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_job_learns_from_what_replicas_draw(
    replica: Running, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rl_job(tmp_path, method, replica.url)
    (tmp_path / "token").write_text("secret")
    drawn = []
    real = rollouts.Rollouts.draw

    async def draw(self: rollouts.Rollouts, asked: rollouts.DrawRequest) -> Any:
        answers = await real(self, asked)
        drawn.append((asked.policy, len(answers)))
        return answers

    monkeypatch.setattr(rollouts.Rollouts, "draw", draw)
    assert await asyncio.to_thread(run, job) == 0
    assert len(read_curve(job)) == 3
    assert job.artifacts
    assert len({policy for policy, _ in drawn}) == 3, "one policy for each step"
    assert sum(count for _, count in drawn) == 3 * 4 * (6 if method == "grpo" else 1)
    assert await taken_back(replica, "test/job") is None, "its trainer has seen to that"


@pytest.mark.parametrize("code", [75, 42], ids=["yields", "fails"])
@pytest.mark.asyncio(loop_scope="module")
async def test_no_policy_is_left_behind_by_a_job_that(
    replica: Running, tmp_path: Path, code: int
) -> None:
    hyper = {"max_steps": 10_000, "batch_size": 4}
    job = rl_job(tmp_path, "grpo", replica.url, hyperparameters=hyper)
    (tmp_path / "token").write_text("secret")
    process, served = start(job), Path(replica.service.config.model_path)
    await eventually(lambda: read_curve(job))
    if code == 75:
        process.terminate()
    else:
        await replica.service.load_weights(halved(tmp_path / "other"))
    await asyncio.to_thread(process.join)
    assert process.exitcode == code
    assert await taken_back(replica, "test/job") is None
    await replica.service.load_weights(served)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_job_with_another_base_model_says_so_and_is_not_tried_again(
    replica: Running, tmp_path: Path
) -> None:
    base = write_tiny_model(tmp_path / "base", layers=3)
    job = rl_job(tmp_path, "grpo", replica.url, base_model=str(base))
    (tmp_path / "token").write_text("secret")
    assert await asyncio.to_thread(run, job) == 42
    assert job.last_word["reason"] == "RolloutRefused"
    assert len(set(re.findall(r"[0-9a-f]{64}", job.last_word["message"]))) == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_a_policy_that_went_astray_ends_the_job_at_once_and_harms_nobody_else(
    replica: Running, tmp_path: Path
) -> None:
    wild = {"learning_rate": 1e30, "warmup_ratio": 0.0, "max_steps": 3}
    job = rl_job(tmp_path, "grpo", replica.url, hyperparameters=wild)
    (tmp_path / "token").write_text("secret")
    assert await asyncio.to_thread(run, job) == 42
    assert job.last_word["reason"] == "LossNotFinite"
    said = job.last_word["message"]
    assert "a replica of rl.rollout has no finite numbers for this policy. Lower hyper" in said
    policy, fleet = Learner(replica).step(), fleet_of(replica.url)
    answers = await asyncio.to_thread(fleet.draw, policy, ASKED, RULES)
    assert np.isfinite(told(answers)).all()
