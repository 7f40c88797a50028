"""The demo says what a cluster of one's own lacks."""

from hack.demo.waiting import what_is_missing


def pod(reason: str) -> dict[str, object]:
    waiting = {"image": "mizzen/control:dev", "state": {"waiting": {"reason": reason}}}
    return {"status": {"containerStatuses": [waiting]}}


def test_an_image_that_cannot_be_pulled_is_named_once() -> None:
    (line,) = what_is_missing([pod("ErrImagePull"), pod("ImagePullBackOff")], [])
    assert "cannot pull mizzen/control:dev" in line
    assert "MIZZEN_IMAGES" in line


def test_a_claim_without_a_volume_is_named() -> None:
    claim = {"metadata": {"name": "models", "namespace": "q"}, "status": {"phase": "Pending"}}
    (line,) = what_is_missing([pod("ContainerCreating"), {"status": {}}], [claim])
    assert "claim models is not bound" in line
    assert "StorageClass" in line


def test_nothing_is_made_up() -> None:
    assert what_is_missing([pod("ContainerCreating")], [{"status": {"phase": "Bound"}}]) == []
