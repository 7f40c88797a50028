"""What the interpreter runs compiles too: down to an H100's machine code, without an H100."""

import os
import subprocess
import sys
from pathlib import Path

from tests.fixtures.hopper_kernels import KERNELS


def test_every_kernel_compiles_for_an_h100_and_fits_its_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-m", "tests.fixtures.hopper_kernels"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout.split("\n")[:-1] == [f"{name} 0" for name in KERNELS]
