"""Stand-ins for the libraries of GPUs: they load as the true ones do, and only without a GPU."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine import hollow, spawn
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.hollow import NotALibraryError, hollow_out
from mizzen.runtime.engine.remote import RemoteEngine
from mizzen.runtime.engine.spawn import EngineProcess
from mizzen.runtime.engine.stand_ins import LIBRARIES, has_gpu, write_stand_ins
from mizzen.runtime.engine.startup import NullRecorder
from tests.fixtures.runtime_server import eventually


def _openmp() -> Path:
    """Return a library that PyTorch brings along, and that has versions of symbols."""
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    (library,) = Path(torch.origin).parent.glob("lib/libgomp*.so*")
    return library


def test_a_hollow_library_loads_and_answers_1_to_every_call(tmp_path: Path) -> None:
    library = tmp_path / "libgomp.so.1"
    library.write_bytes(hollow_out(_openmp().read_bytes()))
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).omp_get_level())"
    for path, answer in [(_openmp(), "0"), (library, "1")]:
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == answer
    assert library.stat().st_size < _openmp().stat().st_size


def test_a_hollow_library_is_found_by_the_versions_of_its_symbols(tmp_path: Path) -> None:
    library = tmp_path / "libgomp.so.1"
    library.write_bytes(hollow_out(_openmp().read_bytes()))
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); find = ctypes.CDLL(None).dlvsym; "
        "find.restype = ctypes.c_void_p; handle = ctypes.c_void_p(library._handle); "
        "print(*(bool(find(handle, b'omp_get_level', v)) for v in (b'OMP_3.0', b'OMP_9.9')))"
    )
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def _openmp_with(kind: int) -> bytes:
    """Return the library with another kind of symbol for one of its functions."""
    library = bytearray(_openmp().read_bytes())
    tables, _ = hollow._read(bytes(library))
    symbols, names = tables[hollow._SYMBOLS].content, tables[hollow._NAMES].content
    name = names.index(b"\0omp_get_level\0") + 1
    (entry,) = (
        at
        for at in range(0, len(symbols), hollow._SYMBOL.size)
        if hollow._SYMBOL.unpack_from(symbols, at)[0] == name
    )
    library[library.index(symbols) + entry + 4] = kind
    return bytes(library)


@pytest.mark.parametrize(("kind", "found"), [(0x12, "True"), (0x22, "False"), (0xA2, "False")])
def test_templates_that_many_libraries_define_are_not_found_in_a_hollow_one(
    tmp_path: Path, kind: int, found: str
) -> None:
    library = tmp_path / "libgomp.so.1"
    library.write_bytes(hollow_out(_openmp_with(kind)))
    code = "import ctypes, sys; print(hasattr(ctypes.CDLL(sys.argv[1]), 'omp_get_level'))"
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


NOT_LIBRARIES = {
    "nothing": b"",
    "text": b"INPUT(libgomp.so.1)\n" * 9,
    "a header alone": _openmp().read_bytes()[:64],
    "a library of another processor": b"\x7fELF\x02\x01\x01"
    + bytes(9)
    + b"\x03\0\xb7\0"
    + bytes(44),
    "half a library": _openmp().read_bytes()[:10_000],
    "a library with variables": _openmp_with(0x11),
}


@pytest.mark.parametrize("content", NOT_LIBRARIES.values(), ids=NOT_LIBRARIES)
def test_what_is_no_library_is_refused(content: bytes) -> None:
    with pytest.raises(NotALibraryError):
        hollow_out(content)


def test_a_stand_in_lies_where_the_library_does_unless_it_cannot_be_read(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "stand-ins"
    libraries = site / "nvidia" / "cu13" / "lib"
    libraries.mkdir(parents=True)
    (libraries / "libcublasLt.so.13").write_bytes(_openmp().read_bytes())
    (libraries / "libcudart.so.13").write_bytes(_openmp().read_bytes())  # asked for devices
    (libraries / "libnvrtc.so.13").write_text("a build for another machine")
    (libraries / "libcufft.so.12").touch()
    write_stand_ins(folder, [str(tmp_path / "absent"), str(site)])
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert set(files) == {Path("nvidia/cu13/lib/libcublasLt.so.13"), Path("cuda/__init__.py")}


@pytest.mark.parametrize(("node", "expected"), [("nvidiactl", True), ("dxg", True), ("tty", False)])
def test_a_gpu_is_there_when_its_node_is(tmp_path: Path, node: str, expected: bool) -> None:
    (tmp_path / node).touch()
    assert has_gpu(tmp_path) is expected


async def test_without_a_gpu_the_engine_loads_none_of_the_libraries_that_fill_memory(
    tmp_path: Path,
) -> None:
    with EngineProcess(devices=tmp_path) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        # The last that `import torch` loads, and so after all of these.
        await eventually(lambda: "libtorch_python.so" in maps.read_text())
        (folder,) = (Path(each) for each in _stand_ins(process))
        assert _loaded(process) == set(folder.glob("nvidia/*/lib/*"))
        process.socket.close()
        assert process.wait(120) == 0  # it came as far as to its settings
        assert folder.exists()  # for ranks that are started later
    assert not folder.exists()


async def test_an_engine_that_has_started_leaves_no_files_behind(tmp_path: Path) -> None:
    with EngineProcess(devices=tmp_path) as process:
        (folder,) = (Path(each) for each in _stand_ins(process))
        model = write_tiny_model(tmp_path / "tiny", context=64)
        config = EngineConfig(model=model, device="cpu", dtype="float32", kv_cache_gib=0.02)
        assert folder.exists()
        engine = await RemoteEngine.start(process, config, NullRecorder())
        assert not folder.exists()
        await engine.stop()


def test_with_a_gpu_the_engine_has_no_stand_ins(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    with EngineProcess(devices=tmp_path) as process:
        assert _stand_ins(process) == []


def test_without_room_for_stand_ins_the_engine_starts_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spawn, "write_stand_ins", fail)
    with EngineProcess(devices=tmp_path) as process:
        assert _stand_ins(process) == []
    assert "No space left on device" in caplog.text


def _loaded(process: EngineProcess) -> set[Path]:
    """Return which of the libraries the process has, true or not."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[-1]) for line in lines}
    return {path for path in paths if path.name.split(".")[0].removeprefix("lib") in LIBRARIES}


def _stand_ins(process: EngineProcess) -> list[str]:
    """Return what the process's path for Python has beyond our own."""
    variables = _environment(process).split("\0")
    path = next((each for each in variables if each.startswith("PYTHONPATH=")), "PYTHONPATH=")
    entries = path.removeprefix("PYTHONPATH=").split(os.pathsep)
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in entries if entry not in ours]


def _environment(process: EngineProcess) -> str:
    """Return the process's environment; the kernel shows none until it has replaced the program."""
    ends = time.monotonic() + 60
    while not (content := Path(f"/proc/{process.pid}/environ").read_bytes()):
        assert time.monotonic() < ends, "the process has no environment"
        time.sleep(0.01)
    return content.decode()
