"""Compile `fixify/heads/kernels.c` while a wheel is built, once per instruction set.

Without a C compiler the wheel is built without it. fixify then works, and evaluates heads on a processor more slowly.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# As `torch.backends.cpu.get_cpu_capability` tells them apart; see `fixify.heads.kernels.library`.
X86 = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "base": (),
}
OTHERS: dict[str, tuple[str, ...]] = {"base": ()}
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-psabi")


class KernelsHook(BuildHookInterface[Any]):
    """Hatchling's hook for wheels, editable ones included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform in the wheel's tag."""
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        folder = Path(self.root, "fixify", "heads")
        for old in folder.glob("kernels-*.bin"):
            old.unlink()
        if compiler is None or os.name != "posix":
            self.app.display_warning("No C compiler was found: fixify is built without compiled kernels.")
            return
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for name, flags in (X86 if x86 else OTHERS).items():
            file = folder / f"kernels-{name}.bin"
            command = [*compiler.split(), *FLAGS, *flags, "-o", str(file), str(folder / "kernels.c"), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                file.unlink(missing_ok=True)
                self.app.display_warning(f"fixify's kernels were not compiled for {name}: {result.stderr.strip()}")
        if list(folder.glob("kernels-*.bin")):
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
