"""Images hold exactly what development was tested with."""

import tomllib

import pytest

from hack.cluster.places import REPOSITORY
from hack.images.locks import FOLDER, FULL, pins

SUBSETS = ["control.lock", "runtime.lock", "torch.lock"]


@pytest.mark.parametrize("name", SUBSETS)
def test_every_pin_of_an_image_is_the_full_locks(name: str) -> None:
    full = pins(FULL)
    differing = {
        one: version for one, version in pins(FOLDER / name).items() if full[one] != version
    }
    assert differing == {}


@pytest.mark.parametrize("name", [*SUBSETS, "build.lock", "uv.lock"])
def test_every_pin_has_hashes(name: str) -> None:
    blocks = (FOLDER / name).read_text().replace("\\\n", " ").splitlines()
    assert [block for block in blocks if "==" in block and "--hash=sha256:" not in block] == []


def test_the_control_image_has_no_pytorch() -> None:
    names = set(pins(FOLDER / "control.lock"))
    assert not names & {"torch", "triton", "transformers"}
    assert not [name for name in names if name.startswith("nvidia-")]


def test_pytorchs_layer_and_the_one_above_share_no_package() -> None:
    assert not set(pins(FOLDER / "torch.lock")) & set(pins(FOLDER / "runtime.lock"))


@pytest.mark.parametrize("extra", ["", "runtime", "rlhf", "transformers"])
def test_every_dependency_that_the_project_names_is_in_its_image(extra: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    locks = ["control.lock"] if not extra else ["runtime.lock", "torch.lock"]
    present = {name for lock in locks for name in pins(FOLDER / lock)}
    names = {_name(requirement) for requirement in wanted}
    assert names <= present


def _name(requirement: str) -> str:
    for end in "[<>=!~; ":
        requirement = requirement.split(end)[0]
    return requirement.lower()
