"""Compiles the CPU kernels into the package, for wheels and editable installs alike."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_KERNELS = Path("runtime", "kernels")


class KernelsHook(BuildHookInterface):
    """Without a compiler the package is built all the same: torch then does the kernels' work."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put what was compiled into the wheel."""
        path = Path(self.root) / _KERNELS / "compile.py"
        spec = importlib.util.spec_from_file_location("compile_kernels", path)
        compiling = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiling)
        try:
            libraries = compiling.compile_all()
        except compiling.NoCompilerError as error:
            self.app.display_warning(f"Left out the CPU kernels: slower on CPUs. {error}")
            return
        if version == "editable":
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
        # Git ignores them, and where Git does not look they belong to the package anyway: named as
        # artifacts they are in the wheel once either way.
        build_data["artifacts"] += [f"mizzen/{_KERNELS / library.name}" for library in libraries]
