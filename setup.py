"""Builds the native library; everything else is in pyproject.toml.

QUOTA_BUILD=auto  build quota/_native/libquota_cpu.so when a C++ compiler and torch's headers are there, else say why not (default)
QUOTA_BUILD=cpu   build it or fail
QUOTA_BUILD=none  do not build it

The library is a plain shared object (no Python API, torch's stable ABI), so one wheel per platform serves every Python and every torch >= 2.11.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "none")
# One rounding per operation on every instruction set: no contraction, no reassociation.
FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-g0",
]  # fmt: skip
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mavx2"]
X86_FLAGS = {
    "amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
    "avx512vnni": AVX512,
    "avxvnni": ["-mavxvnni", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def mode() -> str:
    value = os.environ.get("QUOTA_BUILD", "auto")
    if value not in MODES:
        sys.exit(f"QUOTA_BUILD: expected one of {', '.join(MODES)}, got {value!r}")
    return value


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("torch is not installed in the building environment; use pip install --no-build-isolation")
    return Path(spec.submodule_search_locations[0])


def sources() -> dict[str, list[str]]:
    """Source -> the flags of its instruction set."""
    found = {}
    for path in sorted([*(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/torch").glob("*.cpp")]):
        if path.stem in X86_FLAGS and not IS_X86:
            continue
        found[str(path.relative_to(ROOT))] = X86_FLAGS.get(path.stem, []) if path.parent.name == "cpu" else []
    return found


class NativeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit: it is not a Python module

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            if mode() == "cpu":
                raise
            print(f"warning: quota's native CPU library was not built, the slow reference runs instead: {error}", file=sys.stderr)

    def _build(self, ext: Extension) -> None:
        torch = torch_folder()
        compiler = self.compiler
        macros = [("QUOTA_X86", "1")] if IS_X86 else []
        # No path of the building machine in messages; the later option wins, and torch may live inside the repository.
        common = [*FLAGS, f"-ffile-prefix-map={ROOT}=quota", f"-ffile-prefix-map={torch.parent}="]

        def one(item: tuple[str, list[str]]) -> list[str]:
            source, flags = item
            include = [str(ROOT / "csrc/include"), str(ROOT / "csrc/cpu")]
            own_macros = list(macros)
            if source.startswith("csrc/torch"):
                include.append(str(torch / "include"))
                own_macros.append(("TORCH_TARGET_VERSION", "0x020b000000000000"))
            return compiler.compile([source], output_dir=self.build_temp, macros=own_macros, include_dirs=include, extra_postargs=common + flags)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(one, sources().items()) for name in names]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler.link_shared_object(objects, str(target), libraries=["torch_cpu"], library_dirs=[str(torch / "lib")], target_lang="c++")

    def get_outputs(self) -> list[str]:
        return [name for name in super().get_outputs() if Path(name).exists()]

    def copy_extensions_to_source(self) -> None:
        """Editable install: put the library beside its package (skipped when auto could not build it)."""
        built = [ext for ext in self.extensions if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()]
        self.extensions, every = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = every


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        return (python, abi, plat) if self.root_is_pure else ("py3", "none", plat)


def extensions() -> list[Extension]:
    if mode() == "none":
        return []
    return [Extension("quota._native.libquota_cpu", list(sources()))]


setup(ext_modules=extensions(), cmdclass={"build_ext": NativeBuild, "bdist_wheel": PlatformWheel})
