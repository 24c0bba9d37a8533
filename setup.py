"""Builds the native libraries; everything else is in pyproject.toml.

QUOTA_BUILD=auto  the CPU library when a C++ compiler and torch's headers are there, else say why not; the CUDA library
too when torch is a CUDA build and
                  nvcc is there (default)
QUOTA_BUILD=cpu   the CPU library or fail
QUOTA_BUILD=cuda  both or fail; torch may be the CPU build: the CUDA library links against either, loads in either and
runs where torch has CUDA
QUOTA_BUILD=none  neither

QUOTA_CUDA_ARCHS  architectures of the CUDA library, default "80;90a;90+PTX": devices of 8.6 and 8.9 run the code for
8.0; "+PTX" is for later ones, compiled by their driver
QUOTA_CUDA_JOBS   nvcc processes at a time, default the number of processors
CUDA_HOME         where nvcc is looked for first, in bin/

The libraries are plain shared objects (no Python API, torch's stable ABI), so one wheel per platform serves every
Python and every torch >= 2.11.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
# One rounding per operation on every instruction set: no contraction, no reassociation.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    "-g0",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mavx2"]
X86_FLAGS = {
    "amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
    "avx512vnni": AVX512,
    "avxvnni": ["-mavxvnni", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
CUDA_ARCHS = "80;90a;90+PTX"
# -fmad=false as above; -lineinfo costs nothing at run time and lets profilers and compute-sanitizer name lines.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-lineinfo",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "--threads",
    "1",
]
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


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")


def cuda_asked() -> bool:
    """Whether the CUDA library is built: on request, or when torch is a CUDA build and nvcc is there. Whether this
    machine has a GPU does not matter."""
    if mode() == "cuda":
        if nvcc() is None:
            sys.exit(
                "QUOTA_BUILD=cuda: nvcc was not found on PATH (nor in CUDA_HOME/bin); install the CUDA toolkit 13, or"
                " use QUOTA_BUILD=cpu"
            )
        return True
    if mode() != "auto" or nvcc() is None or importlib.util.find_spec("torch") is None:
        return False
    return "cuda: Optional[str] = '" in Path(torch_folder(), "version.py").read_text()


def cuda_targets() -> list[str]:
    """QUOTA_CUDA_ARCHS -> nvcc's options: "90a" machine code, "90+PTX" code for later architectures."""
    options = []
    for arch in filter(None, os.environ.get("QUOTA_CUDA_ARCHS", CUDA_ARCHS).split(";")):
        number, _, ptx = arch.partition("+")
        if not number.rstrip("af").isdigit() or ptx not in ("", "PTX") or int(number.rstrip("af")) < 80:
            sys.exit(f'QUOTA_CUDA_ARCHS: expected architectures from 80 on, like "80;90a;90+PTX", got {arch!r}')
        options.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    if not options:
        sys.exit("QUOTA_CUDA_ARCHS: expected at least one architecture, got none")
    return options


def sources() -> dict[str, list[str]]:
    """Source -> the flags of its instruction set."""
    found = {}
    for path in sorted([*(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/torch").glob("*.cpp")]):
        if (path.stem in X86_FLAGS and not IS_X86) or path.stem == "bindings_cuda":
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
            (self._build_cuda if ext.name.endswith("_cuda") else self._build)(ext)
        except Exception as error:
            if mode() != "auto":
                raise
            print(f"warning: {ext.name} was not built, slower implementations run instead: {error}", file=sys.stderr)

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
            return compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=own_macros,
                include_dirs=include,
                extra_postargs=common + flags,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(one, sources().items()) for name in names]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler.link_shared_object(
            objects, str(target), libraries=["torch_cpu"], library_dirs=[str(torch / "lib")], target_lang="c++"
        )

    def _build_cuda(self, ext: Extension) -> None:
        """Kernels know nothing of torch and are compiled by nvcc for each architecture; the bindings see only torch's
        stable ABI."""
        compiler, torch, folder = nvcc(), torch_folder(), Path(self.build_temp, "cuda")
        assert compiler is not None
        folder.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / name}" for name in ("csrc/cuda", "csrc/include", "csrc/torch")]

        def one(source: Path) -> str:
            target = str(folder / f"{source.stem}.o")
            extra = (
                cuda_targets()
                if source.suffix == ".cu"
                else [f"-I{torch / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
            )
            if "-gencode=arch=compute_90a,code=sm_90a" in cuda_targets():
                extra.append("-DQUOTA_WARPGROUP")
            language = "-std=c++20" if source.suffix == ".cpp" else NVCC_FLAGS[0]
            self.spawn(
                [
                    compiler,
                    language,
                    *NVCC_FLAGS[1:],
                    *include,
                    *extra,
                    "-c",
                    str(source.relative_to(ROOT)),
                    "-o",
                    target,
                ]
            )
            return target

        kernels = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/torch/bindings_cuda.cpp"]
        with ThreadPoolExecutor(int(os.environ.get("QUOTA_CUDA_JOBS", 0)) or os.cpu_count()) as pool:
            objects = list(pool.map(one, kernels))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # The CUDA runtime goes in (its default). libtorch_cuda.so is not linked: the bindings look its one function up
        # when it is first needed, so that the library loads in every torch, and links against any.
        self.spawn([compiler, "-shared", "-o", str(target), *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"])

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
    cuda = [Extension("quota._native.libquota_cuda", [])] if cuda_asked() and cuda_targets() else []
    return [Extension("quota._native.libquota_cpu", list(sources())), *cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": NativeBuild, "bdist_wheel": PlatformWheel})
