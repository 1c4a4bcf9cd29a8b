"""Which part of r1v3 may import which, and the sizes that keep a file readable, from the syntax."""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "r1v3"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted(
    path
    for folder in ("r1v3", "tests", "tests_stacks", "benchmarks", "csrc")
    for pattern in ("*.py", "*.cpp", "*.h", "*.cu")
    for path in (ROOT / folder).rglob(pattern)
)

# What each part must not import; deferred imports inside functions count as well.
FORBIDDEN = {
    "kernels": ("transformers", "megatron", "vllm", "pydantic"),
    "config": ("torch", "transformers", "megatron", "vllm", "r1v3.kernels"),
    "rewards": ("torch", "transformers", "megatron", "vllm", "r1v3.kernels"),
    "data": (
        "r1v3.kernels", "r1v3.model", "r1v3.engine", "r1v3.rollout", "r1v3.trainer",
        "r1v3.evaluation", "r1v3.plan", "r1v3.report", "r1v3.suite", "r1v3.serve",
    ),
    "model": (
        "r1v3.engine", "r1v3.rollout", "r1v3.trainer", "r1v3.evaluation", "r1v3.plan",
        "r1v3.report", "r1v3.suite", "r1v3.serve",
    ),
    "engine": (
        "r1v3.rollout", "r1v3.trainer", "r1v3.evaluation", "r1v3.plan", "r1v3.report", "r1v3.suite",
        "r1v3.serve",
    ),
    "plan": (
        "r1v3.engine", "r1v3.rollout", "r1v3.trainer", "r1v3.evaluation", "r1v3.report",
        "r1v3.suite", "r1v3.serve",
    ),
    "rollout": (
        "r1v3.trainer", "r1v3.evaluation", "r1v3.plan", "r1v3.report", "r1v3.suite", "r1v3.serve",
    ),
    "evaluation": ("r1v3.trainer", "r1v3.plan", "r1v3.report", "r1v3.suite", "r1v3.serve"),
    "suite": ("r1v3.trainer", "r1v3.plan", "r1v3.serve"),
    "serve": ("r1v3.trainer", "r1v3.plan", "r1v3.report", "r1v3.suite"),
    "report": (
        "r1v3.model", "r1v3.engine", "r1v3.rollout", "r1v3.trainer", "r1v3.plan", "r1v3.suite",
        "r1v3.serve",
    ),
    "distill": (
        "torch", "transformers", "r1v3.kernels", "r1v3.model", "r1v3.engine", "r1v3.rollout",
        "r1v3.trainer", "r1v3.plan", "r1v3.serve",
    ),
    "trainer": ("r1v3.plan", "r1v3.report", "r1v3.suite", "r1v3.serve"),
}  # fmt: skip
KERNELS_MAY_IMPORT = {"torch", "triton", "r1v3"} | set(sys.stdlib_module_names)
# Importing these takes seconds, or fails where the package is optional.
NEVER_AT_TOP = (
    "vllm", "wandb", "flash_attn", "transformer_engine", "apex", "verl", "trl", "slime", "openrlhf",
    "nemo_rl", "prime_rl", "swift",
)  # fmt: skip
# Of r1v3 itself, an adapter loads what is light in another stack's process.
ADAPTERS_MAY_IMPORT = ("r1v3.kernels", "r1v3.rewards", "r1v3.integrations", "r1v3.data.words",
                       "r1v3.data.thoughts")  # fmt: skip


def part_of(path: Path) -> str:
    """`kernels` for r1v3/kernels/x.py, `config` for r1v3/config.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Absolute dotted names imported by a file: `from r1v3 import _C` gives r1v3._C."""
    tree = syntax(path)
    package = path.relative_to(ROOT).parts[:-1]
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def offences(parts: set[str], prefixes: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if part_of(path) in parts
        for name in imports(path)
        if any(within(name, prefix) for prefix in prefixes)
    ]


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_one_way(part: str) -> None:
    """Fails if a lower layer comes to depend on a higher one."""
    assert offences({part}, FORBIDDEN[part]) == []


def test_kernels_import_torch_and_triton_only() -> None:
    """Fails if `from r1v3.kernels import ...` drags the rest of r1v3 into another stack."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if part_of(path) == "kernels"
        for name in imports(path)
        if name.split(".")[0] not in KERNELS_MAY_IMPORT
        or (within(name, "r1v3") and not (within(name, "r1v3.kernels") or name == "r1v3._C"))
    ]
    assert found == []


def module_name(path: Path) -> str:
    """`r1v3.data` for r1v3/data/__init__.py, `r1v3.data.batch` for r1v3/data/batch.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Which module of r1v3 imports which, deferred and TYPE_CHECKING imports included."""
    modules = {module_name(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        # `from r1v3.data.batch import Batch` yields r1v3.data.batch.Batch: an attribute.
        found = {
            target if target in modules else target.rpartition(".")[0] for target in imports(path)
        }
        graph[name] = (found & modules.keys()) - {name}
    return graph


def test_no_module_imports_itself_in_a_circle() -> None:
    """Fails if modules cannot be read, moved or tested one at a time."""
    sorter = graphlib.TopologicalSorter(import_graph())
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nobody_imports_integrations_but_the_command_line() -> None:
    """Fails if the core needs a foreign framework's adapter."""
    parts = {part_of(path) for path in SOURCES} - {"integrations", "cli"}
    assert offences(parts, ("r1v3.integrations",)) == []


def test_nobody_imports_distill_but_the_command_line() -> None:
    """Fails if another stage needs the pipeline that only prepares its data."""
    parts = {part_of(path) for path in SOURCES} - {"distill", "cli"}
    assert offences(parts, ("r1v3.distill",)) == []


def test_adapters_load_little_of_the_rest() -> None:
    """Fails if an adapter needs packages that only r1v3's own trainers need."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if part_of(path) == "integrations"
        for name in imports(path)
        if within(name, "r1v3") and not any(within(name, part) for part in ADAPTERS_MAY_IMPORT)
    ]
    assert found == []


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """Fails if a module cannot be imported without an optional package."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for name in imports(path, top_only=True)
        if any(within(name, package) for package in NEVER_AT_TOP)
    ]
    assert found == []


def test_packages_that_break_cpu_installs_are_not_used() -> None:
    """Fails if torchvision or timm is imported: with them InternVL cannot be loaded on a CPU."""
    assert offences({part_of(path) for path in SOURCES}, ("torchvision", "timm")) == []


def loaded_after(module: str) -> set[str]:
    program = f"import sys, {module}; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("r1v3", {"torch", "numpy", "transformers"}),
        ("r1v3.kernels", {"transformers", "megatron", "vllm", "pydantic"}),
        ("r1v3.config", {"torch", "transformers", "megatron", "vllm"}),
        ("r1v3.rewards", {"torch", "transformers", "megatron", "vllm"}),
        ("r1v3.cli", {"torch", "transformers", "megatron", "vllm", "matplotlib"}),
        ("r1v3.distill.run", {"torch", "transformers", "matplotlib", "scipy"}),
    ],
)
def test_an_import_loads_only_what_it_says(module: str, absent: set[str]) -> None:
    """Fails if something indirect makes an import slow or needs a package it should not."""
    assert loaded_after(module) & absent == set()


def test_files_stay_below_800_lines() -> None:
    """Fails if a file has grown past what one reads in one sitting: split it by concept."""
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in CODE
    }
    assert {path: lines for path, lines in sizes.items() if lines >= 800} == {}


def is_jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def test_functions_stay_short() -> None:
    """Fails if a function reaches 60 lines without its docstring (a Triton kernel: 120)."""
    found = []
    for path in CODE:
        if path.suffix != ".py":
            continue
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = lines_without_docstring(node)
                if lines > (120 if is_jit(node) else 60):
                    found.append(f"{path.relative_to(ROOT)}:{node.name} has {lines} lines")
    assert found == []


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of parameters, `self` and `cls` left out."""
    found = function.args
    names = [each.arg for each in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    names += [each.arg for each in (found.vararg, found.kwarg) if each is not None]
    return len([name for name in names if name not in ("self", "cls")])


def kernels_of_ops(path: Path) -> set[str]:
    """Names of the functions that a file registers as custom ops, whose schemas are flat."""
    return {
        node.args[1].id
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("register_op", "register_small_op")
        and isinstance(node.args[1], ast.Name)
    }


def public_ops() -> set[str]:
    """Exports of `r1v3.kernels`: public ops, and the references of the same names."""
    (names,) = (
        node.value
        for node in syntax(PACKAGE / "kernels" / "__init__.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(names))


def test_functions_take_at_most_ten_parameters() -> None:
    """Fails if a signature lists what belongs in a type (public ops and kernels are excepted)."""
    found = []
    for path in SOURCES:
        flat = public_ops() | kernels_of_ops(path) if part_of(path) == "kernels" else set()
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if parameters(node) > 10 and not is_jit(node) and node.name not in flat:
                    name = f"{path.relative_to(ROOT)}:{node.name}"
                    found.append(f"{name} takes {parameters(node)} parameters")
    assert found == []


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def test_docstrings_say_what_it_is_or_does() -> None:
    """Fails if a docstring opens as a question; it is a noun phrase or an imperative."""
    folders = ("tests", "tests_stacks", "benchmarks")
    others = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in [*SOURCES, *others]
        for node in ast.walk(syntax(path))
        if isinstance(node, DOCUMENTED)
        and (text := ast.get_docstring(node))
        and text.split()[0] in ("What", "How", "Why")
    ]
    assert found == []


def test_nothing_is_unpickled() -> None:
    """Fails if a file that somebody else wrote could run code when it is read."""
    found = []
    for path in SOURCES:
        if any(name.split(".")[0] in ("pickle", "dill", "shelve") for name in imports(path)):
            found.append(f"{path.relative_to(ROOT)} imports pickle")
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if arguments.get("weights_only") != "True":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} torch.load")
    assert found == []


def test_the_rules_see_an_offence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the checks above pass because they look at nothing."""
    assert len(SOURCES) > 5
    bad = tmp_path / "r1v3" / "kernels" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from ..trainer import grpo\nimport r1v3.model.internvl\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert set(imports(bad)) == {"r1v3.trainer.grpo", "r1v3.model.internvl"}
