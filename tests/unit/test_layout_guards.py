"""Rules of the layout that no linter knows: each names what breaks when it is not kept."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("operator", "runtime", "mizzen", "hack")
    for path in (ROOT / folder).rglob("*.py")
    if not any(part in ("operator", "runtime") for part in path.relative_to(ROOT).parts[1:2])
)
OPERATOR = sorted((ROOT / "operator").rglob("*.py"))


def test_the_operator_folder_is_no_package_of_its_own() -> None:
    """With an __init__.py, Python started in this folder finds ours instead of its own."""
    assert list((ROOT / "operator").rglob("__init__.py")) == []


def test_the_standard_librarys_operator_is_still_found_from_here() -> None:
    code = "import operator, collections; print(operator.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not done.stdout.startswith(str(ROOT))


@pytest.mark.parametrize("name", ["operator", "runtime"])
def test_the_links_of_the_import_root_are_links(name: str) -> None:
    """A checkout without links would import nothing, or an old copy."""
    link = ROOT / "mizzen" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def test_no_tests_folder_is_named_operator() -> None:
    """It would break the collection of tests, and imports of third parties in them."""
    assert not (ROOT / "tests/operator").exists()


def test_no_test_folder_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("path", OPERATOR, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_has_a_name_of_the_standard_library(path: Path) -> None:
    """Started by path, it would stand before the real one."""
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_hides_what_it_holds(path: Path) -> None:
    allowed = ROOT / "operator/crds/common.py"
    forbidden = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    assert path.stem not in forbidden or path == allowed


@pytest.mark.parametrize("path", OPERATOR, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute(path: Path) -> None:
    """A relative import of a linked folder depends on the name it was first imported by."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}"


def decorated_with_kopf(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and any("kopf.on" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def test_only_handlers_has_kopf_handlers() -> None:
    users = {
        path.relative_to(ROOT).as_posix() for path in OPERATOR if "kopf.on." in path.read_text()
    }
    assert users == {"operator/handlers.py"}


def test_no_handler_is_synchronous() -> None:
    """Kopf runs such a handler in a thread of a small pool."""
    tree = ast.parse((ROOT / "operator/handlers.py").read_text())
    found = decorated_with_kopf(tree)
    assert found
    assert all(isinstance(function, ast.AsyncFunctionDef) for function in found)


def test_handlers_are_events_and_the_process_life_only() -> None:
    """Any other handler writes annotations or finalizers onto our users' objects."""
    text = (ROOT / "operator/handlers.py").read_text()
    used = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("kopf.on.")
    }
    assert used <= {"kopf.on.event", "kopf.on.login", "kopf.on.startup", "kopf.on.cleanup"}


@pytest.mark.parametrize("module", ["mizzen.operator.main", "mizzen.runtime.gateway.main"])
def test_the_control_plane_loads_no_torch(module: str) -> None:
    """Its image has none."""
    code = f"import {module}, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
