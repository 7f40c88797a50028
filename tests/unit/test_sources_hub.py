"""Models from a hub: a real one's HTTP API on loopback, with the faults that networks have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from mizzen.runtime.errors import MizzenError
from mizzen.runtime.sources.address import parse_address
from mizzen.runtime.sources.cache import Cache
from mizzen.runtime.sources.fetch import fetch_model
from mizzen.runtime.sources.progress import LoadProgress
from tests.fixtures.hub_server import HubServer, running_hub

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "README.md": b"read me",
    "modeling_evil.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "onnx/model.safetensors": b"elsewhere",
}
CHOSEN = {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        # The waits between attempts are the library's affair; how often it tries is ours to see.
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
        yield server


Fetch = Callable[..., Path]


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    def bring(source: str = "hf://org/tiny", cache: Path = tmp_path / "cache") -> Path:
        address = parse_address(source)
        assert address is not None
        return fetch_model(address, Cache(cache), LoadProgress())

    return bring


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"manifest.json", "checked"}


def test_only_what_a_loader_reads_is_fetched_and_never_code_or_pickles(
    hub: HubServer, fetch: Fetch
) -> None:
    hub.add("org/tiny", FILES)
    folder = fetch()
    assert names(folder) == CHOSEN
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_all_files_are_of_the_commit_that_the_revision_meant_at_first(
    hub: HubServer, fetch: Fetch
) -> None:
    commit = hub.add("org/tiny", FILES)
    fetch()
    assert all(f"/{commit}/" in a.path for a in hub.asked if "/resolve/" in a.path)
    newer = hub.add("org/tiny", FILES | {"model.safetensors": WEIGHTS[::-1]})
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert (fetch(f"hf://org/tiny@{commit}") / "model.safetensors").read_bytes() == WEIGHTS
    assert newer != commit


def test_a_second_start_fetches_no_file_again(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/tiny", FILES)
    fetch()
    hub.asked.clear()
    fetch()
    assert [asked.path for asked in hub.asked] == ["/api/models/org/tiny/revision/main"]


def begun_at(hub: HubServer) -> set[int]:
    """Return the bytes at which the weights were gone on with."""
    ranges = [a.range for a in hub.asked if a.path.endswith("model.safetensors") and a.range]
    return {int(asked.removeprefix("bytes=").rstrip("-")) for asked in ranges}


def test_a_cut_line_is_gone_on_with_where_it_broke(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/tiny", FILES)
    hub.cut_after["model.safetensors"] = 400_000
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert begun_at(hub) == {400_000 // 2**16 * 2**16}


def test_a_restarted_process_goes_on_with_what_the_last_one_had(
    hub: HubServer, fetch: Fetch
) -> None:
    hub.add("org/tiny", FILES)
    hub.cut_after["model.safetensors"] = 400_000
    hub.refuse["/model.safetensors"] = [0, 503]  # after the first answer
    with pytest.raises(MizzenError, match="answers 503"):
        fetch()
    hub.asked.clear()
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert begun_at(hub) == {400_000 // 2**16 * 2**16}


@pytest.mark.parametrize("where", ["revision/main", "model.safetensors"])
def test_a_hub_that_says_429_is_asked_again(hub: HubServer, fetch: Fetch, where: str) -> None:
    hub.add("org/tiny", FILES)
    hub.refuse[where] = [429, 429]
    assert names(fetch()) == CHOSEN
    assert hub.count(where) >= 3


def test_the_token_goes_to_the_hub_and_not_to_its_store(
    hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", FILES)
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch()
    at_the_hub = [a for a in hub.asked if "/resolve/" in a.path or "/api/" in a.path]
    at_the_store = [a for a in hub.asked if a not in at_the_hub]
    assert {a.token for a in at_the_hub} == {"Bearer hf_secret"}
    assert at_the_store and {a.token for a in at_the_store} == {None}


def nothing_special(hub: HubServer) -> None:
    hub.add("org/tiny", FILES)


def private(hub: HubServer) -> None:
    nothing_special(hub)
    hub.token = "other"


def gated(hub: HubServer) -> None:
    nothing_special(hub)
    hub.gated = True


def away(hub: HubServer) -> None:
    nothing_special(hub)
    hub.refuse["revision/main"] = [503] * 20


def only_pickles(hub: HubServer) -> None:
    hub.add("org/tiny", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})


def many_ggufs(hub: HubServer) -> None:
    hub.add("org/tiny", {"q4.gguf": b"4", "q8.gguf": b"8"})


def always_damaged(hub: HubServer) -> None:
    nothing_special(hub)
    hub.flip_in["model.safetensors"] = 100


TINY = "hf://org/tiny"
BAD = {
    "an unknown repository": (
        nothing_special, "hf://org/other", "SourceNotFound", "no repository org/other (404)",
    ),
    "an unknown revision": (
        nothing_special, f"{TINY}@v9", "SourceNotFound", "no revision v9",
    ),
    "a wrong or missing token": (private, TINY, "SourceForbidden", "spec.model.credentials"),
    "terms that were not accepted": (gated, TINY, "SourceForbidden", "accepted its terms"),
    "a hub that is away": (away, TINY, "SourceUnreachable", "answers 503"),
    "weights only as pickles": (only_pickles, TINY, "PickledWeightsRefused", "Convert them"),
    "several GGUF files": (many_ggufs, TINY, "NotAModel", f"{TINY}@main/q4.gguf"),
    "a file that is not there": (
        many_ggufs, f"{TINY}/q5.gguf", "SourceNotFound", "no file q5.gguf",
    ),
    "an empty folder": (nothing_special, f"{TINY}/none", "SourceNotFound", "no files"),
    "another form": (nothing_special, "hf://tiny", "SourceInvalid", "write hf://ORG/NAME"),
    "a way out of the folder": (nothing_special, f"{TINY}/../x", "SourceInvalid", "'..'"),
    "bytes that stay wrong": (always_damaged, TINY, "ChecksumMismatch", "second attempt"),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "source", "reason", "says"), BAD.values(), ids=BAD)
def test_the_cause_is_named_of(
    hub: HubServer,
    fetch: Fetch,
    prepare: Callable[[HubServer], None],
    source: str,
    reason: str,
    says: str,
) -> None:
    prepare(hub)
    with pytest.raises(MizzenError) as caught:
        fetch(source)
    assert caught.value.reason == reason
    assert says in str(caught.value)


def test_one_file_of_many_can_be_named(hub: HubServer, fetch: Fetch) -> None:
    many_ggufs(hub)
    assert fetch("hf://org/tiny/q8.gguf").read_bytes() == b"8"
    assert hub.count("q4.gguf") == 0


def test_a_file_that_arrives_damaged_is_fetched_once_more(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/tiny", FILES)
    hub.flip_in["model.safetensors"] = 1
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_offline_serves_what_is_cached_and_says_what_is_not(
    hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", FILES)
    fetch()
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert names(fetch()) == CHOSEN
    with pytest.raises(MizzenError, match="HF_HUB_OFFLINE is set") as caught:
        fetch("hf://org/other")
    assert caught.value.reason == "SourceNotCached"
    assert not hub.asked


def test_a_hub_that_is_away_does_not_keep_a_cached_model_from_starting(
    hub: HubServer, fetch: Fetch
) -> None:
    hub.add("org/tiny", FILES)
    fetch()
    away(hub)
    assert names(fetch()) == CHOSEN
