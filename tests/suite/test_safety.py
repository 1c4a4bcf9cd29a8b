"""Text of models and files is never run."""

import ast
from pathlib import Path

import r1v3

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "parse_expr", "sympify", "parse_latex"}
FORBIDDEN_MODULES = {"pickle", "dill", "shelve", "marshal", "joblib", "cloudpickle", "pandas"}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_CALLS - {
                "compile",
                "eval",
            }:
                found.append(name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    return found


def test_nothing_that_a_model_or_a_file_says_is_run() -> None:
    """Fails if `eval`, `exec` or an unpickler comes into the package."""
    sources = sorted(Path(r1v3.__file__).parent.rglob("*.py"))
    assert len([path for path in sources if "suite" in path.parts]) > 10
    found = {str(path): offences(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_search_finds_them() -> None:
    """Fails if the test above passes because it looks at nothing."""
    for bad in ("eval('1')", "exec(x)", "import pickle", "from sympy import f\nf.parse_expr(x)",
                "from pickle import loads", "sympy.sympify(a)", "__import__('os')"):  # fmt: skip
        assert offences(bad), bad
    assert offences("re.compile('a')\nmodel.eval()\nast.literal_eval('1')") == []
