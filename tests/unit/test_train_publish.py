"""Where a result goes beside its volume, and what it says of itself."""

import json
from pathlib import Path
from typing import Any

import obstore
import pytest
import yaml
from obstore.store import S3Store

from mizzen.runtime.train.bucket import upload
from mizzen.runtime.train.card import Provenance
from mizzen.runtime.train.config import load_config
from mizzen.runtime.train.digest import hash_files, model_digest
from mizzen.runtime.train.durable import sha256_of
from mizzen.runtime.train.errors import UploadRefusedError
from mizzen.runtime.train.oci_layout import ARTIFACT_TYPE, write_oci_layout
from mizzen.runtime.train.publish import publish
from tests.fixtures.bucket_server import running_bucket_server
from tests.fixtures.train_runs import run, write_job


def front_matter(card: Path) -> dict[str, Any]:
    _, front, _ = card.read_text().split("---\n", 2)
    return dict(yaml.safe_load(front))


def test_the_card_says_what_the_result_was_made_from_and_how_it_scored(tmp_path: Path) -> None:
    job = write_job(tmp_path, hyperparameters={"seed": 7})
    assert run(job) == 0
    (folder,) = job.artifacts
    front, (suite,) = front_matter(folder / "README.md"), job.last_word["evaluation"]
    assert front["base_model"] == str(tmp_path / "model")
    assert front["base_model_digest"] == f"sha256:{model_digest(tmp_path / 'model')}"
    assert (front["library_name"], front["seed"], front["steps"]) == ("peft", 7, 8)
    assert front["tags"] == ["mizzen", "sft", "lora"]
    assert front["datasets"] == ["colours"] and front["data_digest"].startswith("sha256:")
    assert front["evaluation"] == [
        {"suite": "holdout", "base": suite["base"], "result": suite["candidate"],
         "samples": suite["samples"], "passed": True}
    ]  # fmt: skip
    text = (folder / "README.md").read_text()
    assert "learning_rate: 0.01" in text and "rank: 4" in text and "| passed |" in text
    assert "README.md" in json.loads((folder / "artifact.json").read_text())["files"]


def test_a_result_has_the_curve_of_all_steps_beside_it_and_a_computed_one_none(
    tmp_path: Path,
) -> None:
    learned = write_job(tmp_path / "learned")
    assert run(learned) == 0
    (folder,) = learned.artifacts
    assert (folder / "metrics.jsonl").read_text() == learned.curve
    assert "metrics.jsonl" in json.loads((folder / "artifact.json").read_text())["files"]
    computed = write_job(
        tmp_path / "computed",
        method="quantize",
        quantize={"scheme": "int8"},
        datasets=[],
        evaluation={"suites": []},
        output={"kind": "model"},
    )
    assert run(computed) == 0
    (folder,) = computed.artifacts
    assert not (folder / "metrics.jsonl").exists()


def artifact_in(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / "README.md").write_text("# card")
    return folder


def read_layout(layout: Path) -> dict[str, Any]:
    return dict(json.loads((layout / "index.json").read_text()))


def write(layout: Path, folder: Path, name: str) -> str:
    return write_oci_layout(layout, folder, hash_files(folder), name=name, digest="sha256:ab")


def test_an_oci_layout_holds_every_file_as_a_blob_named_by_its_digest(tmp_path: Path) -> None:
    folder, layout = artifact_in(tmp_path / "a"), tmp_path / "oci"
    digest = write(layout, folder, "support")
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = read_layout(layout)["manifests"]
    assert entry["digest"] == digest and entry["artifactType"] == ARTIFACT_TYPE
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "support"}
    blobs = layout / "blobs" / "sha256"
    assert all(path.name == sha256_of(path) for path in blobs.iterdir())
    manifest = json.loads((blobs / digest.removeprefix("sha256:")).read_text())
    titles = {}
    for part in (manifest["config"], *manifest["layers"]):
        blob = blobs / part["digest"].removeprefix("sha256:")
        assert blob.stat().st_size == part["size"]
        titles[(part.get("annotations") or {}).get("org.opencontainers.image.title")] = blob
    assert titles["adapter_model.safetensors"].read_text() == "weights"
    assert titles["README.md"].read_text() == "# card"


def test_a_name_in_a_layout_moves_on_and_others_stay(tmp_path: Path) -> None:
    layout = tmp_path / "oci"
    first = write(layout, artifact_in(tmp_path / "a"), "support")
    other = write(layout, artifact_in(tmp_path / "b", "more"), "legal")
    again = write(layout, artifact_in(tmp_path / "c", "better"), "support")
    digests = {
        one["annotations"]["org.opencontainers.image.ref.name"]: one["digest"]
        for one in read_layout(layout)["manifests"]
    }
    assert digests == {"support": again, "legal": other}
    assert again != first
    assert (layout / "blobs" / "sha256" / first.removeprefix("sha256:")).exists()


def test_an_artifact_is_copied_to_a_bucket_and_a_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = {"oci_layout": str(tmp_path / "oci"), "s3": "s3://models/adapters"}
    config = load_config(write_job(tmp_path, output=output).config_path)
    with running_bucket_server() as server:
        server.add("models", {})
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        artifact = publish(
            config,
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"weights"),
            step=8,
            verdicts=[],
            made_from=Provenance(base_digest="ab", base_weights="cd", data_digest=None, counts={}),
        )
        folder = Path(artifact.path)
        store = S3Store("models", client_options={"allow_http": True})
        names = {meta["path"] for part in obstore.list(store, "adapters") for meta in part}
        assert names == {f"adapters/{folder.name}/{path.name}" for path in folder.iterdir()}
        key = f"adapters/{folder.name}/adapter_model.safetensors"
        assert bytes(obstore.get(store, key).bytes()) == b"weights"
    (entry,) = read_layout(tmp_path / "oci")["manifests"]
    assert artifact.copies == (
        f"{tmp_path / 'oci'}@{entry['digest']}",
        f"s3://models/adapters/{folder.name}",
    )


def test_a_bucket_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_bucket_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UploadRefusedError, match=r"s3://none/a.*Check output\.s3"):
            upload("s3://none/a", artifact_in(tmp_path / "a"), ["README.md"])
