"""Binaries and images are made once for each content, and never half-made ones are used."""

import shutil
from pathlib import Path

import pytest

from hack.cluster import gobuild
from hack.cluster.errors import ClusterError
from hack.cluster.pins import MODULE, module_version
from hack.images import base, content

GO_MOD = (MODULE / "go.mod").read_text()


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A copy of the Go module's files."""
    return Path(shutil.copytree(MODULE, tmp_path / "gomod"))


def test_the_hash_stays_while_the_files_do(module: Path) -> None:
    assert gobuild.source_hash(module) == gobuild.source_hash(MODULE)


@pytest.mark.parametrize("name", ["go.mod", "go.sum", "all/main.go"])
def test_the_hash_changes_with_each_file(module: Path, name: str) -> None:
    before = gobuild.source_hash(module)
    (module / name).write_text((module / name).read_text() + "\n")
    assert gobuild.source_hash(module) != before


def test_an_interrupted_build_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gobuild, "_node_stages", lambda: "")
    monkeypatch.setattr(gobuild, "_compile", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        gobuild.build()
    assert not gobuild.is_built()

    module = tmp_path / "mizzen" / "go" / "mod" / "k8s.io" / "kubernetes.go"
    module.parent.mkdir(parents=True)
    module.touch()
    monkeypatch.setattr(gobuild, "_compile", lambda folder: (folder / "all").write_text("whole"))
    built = gobuild.build()
    assert not module.exists(), "8 GiB of caches are of no use any more"
    assert (built / "kubectl").read_text() == "whole"
    assert [path.name for path in built.parent.glob("*.partial")] == []


def _interrupted(folder: Path) -> None:
    (folder / "all").write_text("half")
    raise KeyboardInterrupt


def test_every_server_says_its_version() -> None:
    flags = gobuild.linker_flags(GO_MOD)
    kubernetes = module_version("k8s.io/kubernetes", GO_MOD)
    assert f"-X k8s.io/component-base/version.gitVersion={kubernetes} " in flags
    assert f"-X k8s.io/client-go/pkg/version.gitVersion={kubernetes} " in flags
    assert f"internal/version.version={module_version('helm.sh/helm/v4', GO_MOD)}" in flags


def test_a_module_that_go_mod_does_not_require_is_named() -> None:
    with pytest.raises(ClusterError, match=r"go\.mod does not require example\.com/gone"):
        module_version("example.com/gone", GO_MOD)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A tree with one small file for everything that an image is made from."""
    locks = (lock for names in content.LOCKS.values() for lock in names)
    for name in (*content.PROJECT, *content.INSTALL, *locks):
        path = tmp_path / name
        path = path if path.suffix or name in ("Dockerfile", "LICENSE") else path / "module.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def _tag(target: str, root: Path) -> str:
    return content.tag(target, base="base:1", slim_torch=True, root=root)


CHANGES = {
    "source changes both": ("operator/module.py", {"control", "runtime"}),
    "the Dockerfile changes both": ("Dockerfile", {"control", "runtime"}),
    "PyTorch's pin changes the runtime alone": ("requirements/torch.lock", {"runtime"}),
    "the control plane's pins change control alone": ("requirements/control.lock", {"control"}),
    "compiled files change nothing": ("runtime/__pycache__/module.cpython-311.pyc", set()),
}


@pytest.mark.parametrize(("name", "changed"), CHANGES.values(), ids=CHANGES)
def test_an_image_tag_follows_its_content(sources: Path, name: str, changed: set[str]) -> None:
    before = {target: _tag(target, sources) for target in content.LOCKS}
    (sources / name).parent.mkdir(exist_ok=True)
    (sources / name).write_text("changed")
    assert {target for target in before if _tag(target, sources) != before[target]} == changed


def test_the_slim_runtime_has_a_tag_of_its_own(sources: Path) -> None:
    full = content.tag("runtime", base="base:1", slim_torch=False, root=sources)
    assert full != _tag("runtime", sources)


def test_the_base_image_is_named_by_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    before = base.name()
    monkeypatch.setattr(base, "PACKAGES", (*base.PACKAGES, "curl"))
    assert base.name() != before
