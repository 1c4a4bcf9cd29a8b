"""The build: what it needs, what it leaves out, and what its objects may contain."""

import ast
import ctypes.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from r1v3 import _C
from r1v3.doctor import read_pins
from r1v3.kernels.grpo_terms import GrpoOptions

ROOT = Path(__file__).resolve().parent.parent
HAS_NVCC = shutil.which("nvcc") is not None
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# A minute of compiling, which installing the project before the tests has done once already.
compiles_everything = pytest.mark.slow

OPTIONS = GrpoOptions(
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    ratio_clip="ppo",
    kl_coef=0.0,
    kl="k3",
    unbiased_kl=False,
    aggregation="token-mean",
)
# One row of one logit at address 0, or no row.
SINGLE_READ = (
    "_C.logits_grpo_loss_cuda(0, [1, 1, 1], 0, [1, 1, 1], 1, {rows}, 1, 1, 0, 0, 0, 0, 0, 0, "
    f"1.0, {OPTIONS.as_floats()}, 0, 0, 1, 0)"
)


def has_cuda_driver() -> bool:
    return ctypes.util.find_library("cuda") is not None


def run_build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build r1v3._C in a copy of the sources, where importing torch is an error."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "r1v3").mkdir()
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "r1v3" / "__init__.py", folder / "r1v3")
    (folder / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "R1V3_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


def ask_extension(folder: Path, expression: str) -> str:
    """Evaluate an expression on the extension built in `folder`, in a process without torch."""
    program = f"import sys; from r1v3 import _C; assert 'torch' not in sys.modules; {expression}"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One build for this file: with CUDA where there is nvcc, as for everybody else without."""
    folder = tmp_path_factory.mktemp("build")
    wanted = {"R1V3_BUILD_CUDA": "1", "R1V3_CUDA_ARCHS": "90"} if HAS_NVCC else {}
    done = run_build(folder, **wanted)
    assert done.returncode == 0, done.stderr
    yield folder


@compiles_everything
def test_build_needs_neither_torch_nor_a_gpu(built: Path) -> None:
    """Fails if building imports torch, or importing the CUDA build needs a driver or libcudart.so.

    Without nvcc, fails if a plain build carries CUDA code.
    """
    question = (
        "print(_C.built_with_cuda, hasattr(_C, 'logits_grpo_loss_cuda'), _C.cpu_capability())"
    )
    assert ask_extension(built, question) == f"{HAS_NVCC} {HAS_NVCC} {_C.cpu_capability()}"
    if HAS_NVCC:
        # No rows: nothing may be launched, so this works without a device.
        ask_extension(built, SINGLE_READ.format(rows=0))


@compiles_everything
@pytest.mark.skipif(not HAS_NVCC or has_cuda_driver(), reason="needs nvcc and no CUDA driver")
def test_cuda_functions_without_a_device_say_so(built: Path) -> None:
    """Fails if a launch without a driver is silent, or asking whether a row fits raises."""
    assert ask_extension(built, "print(_C.logits_grpo_loss_cluster(1, 152064))") == "0"
    with pytest.raises(subprocess.CalledProcessError) as stop:
        ask_extension(built, SINGLE_READ.format(rows=1))
    assert "RuntimeError: " in stop.value.stderr and "CUDA driver" in stop.value.stderr


@compiles_everything
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm from binutils")
def test_instruction_set_objects_share_no_function(built: Path) -> None:
    """Fails if an inline function compiled for AVX can replace the copy other code uses.

    The linker keeps any one copy of a weak symbol; if that is the AVX-512 copy, a machine without
    AVX-512 stops with an illegal instruction, in a function that has nothing to do with vectors.
    """
    objects = list(built.glob("build/**/rows_*.o"))
    assert any(path.name == "rows_portable.o" for path in objects)
    for path in objects:
        listing = subprocess.run(
            ["nm", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        kinds = {line.split()[-1]: line.split()[-2] for line in listing.splitlines()}
        assert kinds
        assert [name for name, kind in kinds.items() if kind in "WVuwv"] == []
        exported = [name for name, kind in kinds.items() if kind.isupper()]
        assert len(exported) == 1, exported


def test_cuda_build_without_nvcc_says_so(tmp_path: Path) -> None:
    """Fails if asking for CUDA without nvcc is ignored, or refused without a reason."""
    done = run_build(tmp_path, R1V3_BUILD_CUDA="1", PATH=str(tmp_path))
    assert done.returncode != 0
    assert "R1V3_BUILD_CUDA=1 needs nvcc on PATH" in done.stderr


def test_the_installed_extension_is_the_one_described() -> None:
    """Fails if the flag and the function disagree: callers choose the CUDA kernel by the flag."""
    assert _C.built_with_cuda == hasattr(_C, "logits_grpo_loss_cuda")


def test_a_wheel_without_a_compiler_holds_what_the_demo_reads(tmp_path: Path) -> None:
    """Fails if installing takes a compiler, or the demo runs in a checkout alone."""
    for name in ("csrc", "r1v3", "assets", "configs"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    nowhere = str(tmp_path / "no-compiler")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tmp_path,
        env={**os.environ, "R1V3_BUILD_CUDA": "0", "CC": nowhere, "CXX": nowhere},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not any("_C" in name for name in held)
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    wanted |= {f"assets/tiny-internvl/{name}" for name in ("model.safetensors", "config.json")}
    wanted |= {"constraints.txt", "assets/tiny-internvl/chat_template.jinja"}
    assert {f"r1v3/shipped/{name}" for name in wanted} <= held
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "r1v3").rglob("*.py")}
    assert modules <= held
    assert not any(name.startswith(("tests", "benchmarks")) for name in held)


def test_build_isolation_fetches_no_torch() -> None:
    """Fails if `pip install` with build isolation would download a second torch."""
    names = {canonicalize_name(Requirement(r).name) for r in PROJECT["build-system"]["requires"]}
    assert names == {"setuptools", "wheel", "pybind11"}


def test_entry_points_lead_to_modules() -> None:
    """Fails if a plug-in has moved: verl logs what it cannot load at debug level only."""
    for group in PROJECT["project"]["entry-points"].values():
        for module in group.values():
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["", "rewards", "train", "demo", "megatron", "dev"])
def test_every_dependency_is_pinned_within_its_range(extra: str) -> None:
    """Fails if a range changes and the tested version is forgotten, or the other way round."""
    pins = read_pins(ROOT / "constraints.txt")
    for text in EXTRAS[extra] if extra else PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        pinned = pins.get(canonicalize_name(requirement.name))
        if requirement.name != "r1v3" and requirement.name != "nvidia-ml-py":
            assert pinned is not None, f"{requirement.name} is missing from constraints.txt"
            assert requirement.specifier.contains(pinned), f"{text} excludes the tested {pinned}"


def test_the_kernels_alone_need_torch_and_numpy() -> None:
    """Fails if a stack that wants the kernels must install what only r1v3's trainers need."""
    needed = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert needed == {"torch", "numpy"}


def imported_by(folders: Iterable[str]) -> set[str]:
    """Packages that these parts of r1v3 import anywhere."""
    found = set()
    for folder in folders:
        for path in (ROOT / "r1v3").glob(f"{folder}/**/*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"r1v3"}


DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn",
                 "megatron": "megatron-core", "pynvml": "nvidia-ml-py"}  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "folders", "optional"),
    [
        ("rewards", ["rewards"], set()),
        (
            "train",
            ["config", "data", "engine", "evaluation", "model", "rollout", "trainer", "plan"],
            {"scikit-learn", "megatron-core", "flash-attn", "vllm", "wandb", "nvidia-ml-py",
             "typing-extensions"},
        ),
        ("demo", ["data", "report"], {"typing-extensions"}),
    ],
)  # fmt: skip
def test_an_extra_names_what_its_parts_import(
    extra: str, folders: list[str], optional: set[str]
) -> None:
    """Fails if `pip install r1v3[extra]` leaves a package out that the code needs."""
    needed = {"torch", "numpy"}
    left = [extra]
    while left:
        for text in EXTRAS[left.pop()]:
            requirement = Requirement(text)
            left += requirement.extras if requirement.name == "r1v3" else ()
            needed.add(canonicalize_name(requirement.name))
    imported = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in imported_by(folders)}
    assert imported - needed - optional == set()
