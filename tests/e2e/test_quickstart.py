"""The quickstart page, run as written, does what it says."""

import json
import re
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.conftest import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]


def answers(printed: str) -> list[dict[str, Any]]:
    """The chat completions that the page's curl commands printed."""
    decoder = json.JSONDecoder()
    starts = (found.start() for found in re.finditer(r'\{"id": ?"chatcmpl-', printed))
    return [decoder.raw_decode(printed, start)[0] for start in starts]


def test_the_model_answers_and_so_does_its_adapter(quickstart: Cluster) -> None:
    model, adapter = answers(quickstart.printed)
    assert "Paris" in model["choices"][0]["message"]["content"]
    assert "Python" in adapter["choices"][0]["message"]["content"]
    assert adapter["model"] == "smollm2:chatterbot"


def test_the_job_says_what_it_did(quickstart: Cluster) -> None:
    status = quickstart.get("ftj", "chatterbot", "-n", "quickstart")["status"]
    assert status["phase"] == "Succeeded"
    assert status["progress"]["step"] == status["progress"]["totalSteps"]
    assert status["evaluation"][0]["candidate"] < status["evaluation"][0]["base"]
    assert status["artifact"]["digest"].startswith("sha256:")


def test_a_new_replica_serves_the_adapter_too(quickstart: Cluster) -> None:
    status = quickstart.get("llmd", "smollm2", "-n", "quickstart")["status"]
    assert status["readyReplicas"] == 2
    assert status["adapters"][0]["readyReplicas"] == 2


def test_the_official_client_streams(quickstart: Cluster) -> None:
    client = OpenAI(base_url=f"{quickstart.gateway}/v1", api_key=quickstart.api_key)
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Count from one to five."}],
        max_tokens=32, temperature=0, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


def test_without_a_key_nobody_gets_in(quickstart: Cluster) -> None:
    client = OpenAI(base_url=f"{quickstart.gateway}/v1", api_key="mz-wrong", max_retries=0)
    with pytest.raises(Exception, match="401"):
        client.models.list()
