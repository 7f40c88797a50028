"""Building Kueue: what is there is used, and what goes wrong says what to do."""

from pathlib import Path

import pytest

from hack.cluster.errors import ClusterError
from hack.kueue import build


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mizzen" / "kueue"


def test_a_kueue_of_these_modules_is_built_once(cache: Path) -> None:
    there = build.folder()
    assert there.parent == cache
    there.mkdir(parents=True)
    assert build.build() == there


def test_without_go_the_error_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="install Go"):
        build.build()
    assert list(cache.iterdir()) == [], "half a build would be taken for a whole one"


def test_a_build_that_fails_is_told_in_the_compiler_s_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    go.write_text("#!/bin/sh\necho cannot find package >&2; exit 1\n")
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match=r"`go build` failed:\ncannot find package"):
        build.build()
    assert list(cache.iterdir()) == []
