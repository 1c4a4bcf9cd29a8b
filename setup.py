"""Build r1v3._C from csrc/. Everything else about the package is in pyproject.toml.

Without a C++ compiler the package is built without it: every op then runs its reference.
R1V3_BUILD_CUDA=1 at build time also compiles csrc/cuda with the nvcc on PATH;
R1V3_CUDA_ARCHS (default "80;90;100") chooses the architectures. Neither torch nor a GPU is needed,
nor, without build isolation, a network. All processors compile.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

# Each instruction set is one object with its own flags, so the rest runs on any x86-64 or arm64.
ISA_FLAGS = {
    "csrc/cpu/rows_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/rows_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-Wno-maybe-uninitialized",  # GCC 12 warns about its own _mm256_undefined_si256
    ],
    "csrc/cpu/gemm_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/gemm_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl"),
        "-Wno-maybe-uninitialized",
    ],
    "csrc/cpu/gemm_avx512_bf16.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"),
        "-Wno-maybe-uninitialized",
    ],
}
COMMON_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-Wall", "-Wextra"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
BUILD_CUDA = os.environ.get("R1V3_BUILD_CUDA") == "1"


class BuildExtension(build_ext):
    """Adds the objects that need flags or a compiler of their own."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # flags and R1V3_BUILD_CUDA leave no trace in the files' times

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            self._build_objects(ext)
        except FileNotFoundError as error:  # no compiler: setuptools goes on where ext.optional
            raise CompileError(f"no C++ compiler: {error}") from error

    def _build_objects(self, ext: Pybind11Extension) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = []
            if BUILD_CUDA:
                jobs.append(pool.submit(compile_cuda, Path(self.build_temp)))
                ext.define_macros.append(("R1V3_WITH_CUDA", "1"))
            if IS_X86:
                jobs += [pool.submit(self._compile, *item) for item in ISA_FLAGS.items()]
            for job in jobs:
                ext.extra_objects += job.result()
        super().build_extension(ext)

    def _compile(self, source: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            extra_postargs=[*COMMON_FLAGS, *flags, "-std=c++17", "-fvisibility=hidden"],
        )


class BuildPackage(build_py):
    """Adds what `r1v3 demo` reads: files that lie at the root of the repository."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shipped = Path(self.build_lib) / "r1v3" / "shipped"
            for folder in ("assets", "configs"):
                shutil.copytree(folder, shipped / folder, dirs_exist_ok=True)
            shutil.copy("constraints.txt", shipped)


def compile_cuda(build_dir: Path) -> list[str]:
    """Compile csrc/cuda/*.cu; returns the objects and the static CUDA runtime to link."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("R1V3_BUILD_CUDA=1 needs nvcc on PATH; unset it for a CPU-only build")
    build_dir.mkdir(parents=True, exist_ok=True)
    archs = [arch for arch in os.environ.get("R1V3_CUDA_ARCHS", "80;90;100").split(";") if arch]
    options = ["-O3", "-std=c++17", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    options += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    options += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    objects = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        objects.append(str(build_dir / f"{source.stem}.cuda.o"))
        command = [nvcc, *options, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    plan = subprocess.run([*command, "--dryrun"], check=True, capture_output=True, text=True)
    for folder in re.findall(r'"-L([^"]+)"', plan.stderr):
        if (Path(folder) / "libcudart_static.a").exists():
            return [*objects, str(Path(folder) / "libcudart_static.a")]
    raise RuntimeError(f"libcudart_static.a was not found near {nvcc}")


extension = Pybind11Extension(
    "r1v3._C",
    sorted(str(p) for p in Path("csrc").glob("*.cpp"))
    + sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp") if str(p) not in ISA_FLAGS),
    cxx_std=17,
    extra_compile_args=[*COMMON_FLAGS, "-pthread"],
    extra_link_args=["-pthread", *(["-ldl", "-lrt"] if BUILD_CUDA else [])],
    depends=[str(p) for p in Path("csrc").rglob("*.*")],
    optional=not BUILD_CUDA,
)
ParallelCompile().install()
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage})
