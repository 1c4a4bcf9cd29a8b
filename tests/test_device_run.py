"""`python -m benchmarks.device`: limits, interruptions, what it leaves behind, what it needs."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device import __main__ as command
from benchmarks.device import plan, process, record
from benchmarks.device import tests as device_tests
from benchmarks.device.plan import Step
from benchmarks.ops import OPS
from tests.processes import PATIENCE, environment

ROOT = Path(__file__).resolve().parent.parent
# Besides the standard library and this project.
AT_HAND = {"torch", "triton", "numpy"}


def script(text: str) -> tuple[str, ...]:
    return "/bin/sh", "-c", text


def step(name: str, text: str, limit: float = PATIENCE, **named: Any) -> Step:
    return Step(name, script(text), 1.0, limit, **named)


def run(steps: list[Step], output: Path, seconds: float = 10 * PATIENCE) -> dict[str, Any]:
    """The document that these steps leave."""
    command.Run(steps, output, seconds).all()
    found: dict[str, Any] = json.loads((output / "device.json").read_text())
    return found


def statuses(document: dict[str, Any]) -> dict[str, str]:
    return {state["name"]: state["status"] for state in document["steps"]}


def test_every_end_of_a_step_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    """Fails if a step that breaks, hangs or lacks its tool takes the later ones with it."""
    result = tmp_path / "late.json"
    result.write_text('{"problems": []}')
    steps = [
        step("breaks", "echo before; echo the last words; echo; exit 3"),
        step("hangs", "sleep 600", 0.3, result=result),
        step("lacks", "exit 1", needs=("program no-such-program-anywhere",)),
        step("is killed", "kill -9 $$"),
        Step("is not there", ("/no/such/file",), 1.0, 9.0),
        step("passes", "exit 0"),
    ]
    document = run(steps, tmp_path / "out")
    assert statuses(document) == {
        "breaks": "failed",
        "hangs": "timed out",
        "lacks": "absent",
        "is killed": "failed",
        "is not there": "failed",
        "passes": "passed",
    }
    notes = {state["name"]: state["note"] for state in document["steps"]}
    assert notes["breaks"] == "exit status 3: the last words"
    assert "no-such-program-anywhere" in notes["lacks"]
    assert "No such file" in notes["is not there"]
    assert document["ops"] == {"hangs": {"problems": []}}
    log = (tmp_path / "out/log.txt").read_text()
    assert "===== breaks: " in log and "before\nthe last words" in log


def test_without_a_device_nothing_is_tried(tmp_path: Path) -> None:
    """Fails if a machine without a GPU builds and fails for nine minutes before it says so."""
    assert plan.steps(plan.Setting("cuda", tmp_path))[0].decides
    steps = [step("machine", "echo no device; exit 1", decides=True), step("build", "exit 0")]
    document = run(steps, tmp_path)
    assert statuses(document) == {"machine": "failed", "build": "skipped"}
    assert document["steps"][0]["note"] == "exit status 1: no device"


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    """Fails if a benchmark whose time is over goes on and slows the next one down."""
    mark = tmp_path / "alive"
    ended = process.run(
        script(f"(trap '' TERM; while true; do date > {mark}; sleep 0.05; done) & sleep 60"),
        folder=tmp_path, environment={}, log=tmp_path / "log", limit=0.5,
    )  # fmt: skip
    assert ended.status is None
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists()


def test_without_time_left_steps_are_skipped(tmp_path: Path) -> None:
    """Fails if the run goes on past its seconds, or what had no time counts as passed."""
    document = run([step("never", "exit 0")], tmp_path, seconds=command.RESERVE + 1)
    assert statuses(document) == {"never": "skipped"}
    fresh = command.Run([step("never", "exit 0")], tmp_path, command.RESERVE)
    fresh.all()
    assert not fresh.record.ok


def test_no_step_runs_longer_than_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step's own limit outlasts the run's seconds."""
    monkeypatch.setattr(command, "LEAST_SECONDS", 0.2)
    start, seconds = time.monotonic(), command.RESERVE + 3
    document = run([step("hangs", "sleep 600"), step("waits", "exit 0")], tmp_path, seconds)
    assert statuses(document) == {"hangs": "timed out", "waits": "skipped"}
    assert time.monotonic() - start < PATIENCE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_midway_it_leaves_what_was_measured(number: int, tmp_path: Path) -> None:
    """Fails if a run that is ended, politely or not, keeps nothing of the step that ran."""
    result, output = tmp_path / "part.json", tmp_path / "out"
    program = f"""
import sys
from pathlib import Path
from benchmarks.device import __main__ as command
from benchmarks.device.plan import Step
steps = [
    Step("first", ("/bin/sh", "-c", "exit 0"), 1, 60),
    Step("second", ("/bin/sh", "-c", "echo '{{\\"failed\\": [7]}}' > {result}; sleep 300"),
         1, 600, Path("{result}")),
    Step("third", ("/bin/sh", "-c", "exit 0"), 1, 60),
]
command.plan.steps = lambda *a, **k: steps
sys.exit(command.main(["--output", "{output}", "--seconds", "900"]))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    document = wait_for(output / "device.json", lambda found: "second" in found["ops"], child)
    child.send_signal(number)
    text, _ = child.communicate(timeout=PATIENCE)
    document = json.loads((output / "device.json").read_text())
    assert document["ops"]["second"] == {"failed": [7]}
    if number == signal.SIGKILL:
        os.killpg(int(processes_of("sleep 300", str(result))), signal.SIGKILL)
        assert statuses(document) == {"first": "passed", "second": "running", "third": "waiting"}
    else:
        assert child.returncode == 1 and "interrupted" in text
        assert statuses(document) == {
            "first": "passed",
            "second": "interrupted",
            "third": "skipped",
        }


def processes_of(*words: str) -> str:
    """The group of the process whose command line holds these words."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if all(word in line for word in words) and line.startswith("/bin/sh"):
            return folder.name
    raise AssertionError("no such process")


def wait_for(
    path: Path, ready: Callable[[dict[str, Any]], bool], child: subprocess.Popen[str]
) -> dict[str, Any]:
    """The document at `path`, once it is ready."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if path.exists() and ready(found := json.loads(path.read_text())):
            return found
        assert child.poll() is None
        time.sleep(0.05)
    raise AssertionError(f"{path} did not become ready")


def test_the_plan_fits_and_measures_every_op(tmp_path: Path) -> None:
    """Fails if the planned times are more than there is, or an op is never measured on a device."""
    steps = plan.chosen(plan.steps(plan.Setting("cuda", tmp_path)), [])
    assert sum(step.planned for step in steps) <= plan.SECONDS - command.RESERVE
    assert all(step.planned < step.limit < plan.SECONDS for step in steps)
    assert set(plan.OPS) == set(OPS) and set(plan.CPU_OPS) < set(OPS)
    names = [step.name for step in steps]
    order = ["machine", "build", "tests", "racecheck", "logprobs_and_entropy", "ban_tokens"]
    assert [name for name in names if name in order] == order
    assert "training_step" not in names
    named = plan.chosen(plan.steps(plan.Setting("cuda", tmp_path)), ["training_step"])
    assert [step.name for step in named] == ["machine", "training_step"]


def test_the_most_telling_shapes_come_first(tmp_path: Path) -> None:
    """Fails if the seconds of an op go to small shapes, or to the largest, before the one that
    its targets name."""
    for op in ("logprobs_and_entropy", "logits_grpo_loss", "linear_logprobs_and_entropy"):
        first = OPS[op].shapes("cuda", "full")[0]
        assert (first["T"], first["V"]) == (8192, 151_674), op
    (first, *_) = OPS["linear_grpo_loss"].shapes("cuda", "full")
    assert first["B"] * first["T"] == 8192 and first["V"] == 151_674


def test_time_is_shared_as_planned(tmp_path: Path) -> None:
    """Fails if an op that comes late gets nothing because earlier ones took all there was."""
    steps = [Step(str(i), (), planned, 50.0) for i, planned in enumerate((30.0, 10.0))]
    assert steps[0].seconds(20.0, 40.0) == pytest.approx(15.0)
    assert steps[1].seconds(500.0, 10.0) == 40.0


def test_files_with_tests_for_a_gpu_are_all_named() -> None:
    """Fails if a file of tests that a device should run is left out of the run on one."""
    marks = r'usefixtures\("(backend|device)"\)|\b(backend|device): str|mark\.gpu'
    found = {
        path.name
        for path in (ROOT / "tests/kernels").glob("test_*.py")
        if re.search(marks, path.read_text(encoding="utf-8"))
    }
    assert set(device_tests.GPU_FILES) == found


def imported(path: Path) -> set[str]:
    """Modules that importing this file imports, deferred and TYPE_CHECKING ones left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def source(name: str) -> Path | None:
    base = ROOT / name.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def test_a_bare_machine_has_what_it_imports() -> None:
    """Fails if the run on a device needs a package beside torch, Triton and numpy."""
    left = [f"benchmarks.device.{path.stem}" for path in (ROOT / "benchmarks/device").glob("*.py")]
    seen: set[str] = set()
    others: set[str] = set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        path = source(name)
        if path is not None:
            left += imported(path)
        elif name.split(".")[0] not in ("benchmarks", "r1v3"):
            others.add(name.split(".")[0])
    assert "r1v3.kernels.grpo_loss" in seen and "benchmarks.gate" in seen
    assert others - set(sys.stdlib_module_names) - {"__future__"} <= AT_HAND


def test_the_table_says_what_is_wrong_and_how_fast(tmp_path: Path) -> None:
    """Fails if a failed test, a refused kernel or a time of the host's goes unseen."""
    timing = {"median": 5e-4, "late": 0}
    ours = {"implementation": "r1v3", "timing": timing, "percent_of_yardstick": 93.0,
            "over_eager": 8.0, "over_compile": None, "note": ""}  # fmt: skip
    rival = {**ours, "implementation": "liger", "timing": {"median": 1e-3, "late": 0},
             "times_ours": 2.0}  # fmt: skip
    problem = {
        "op": "entropy",
        "mode": "forward",
        "shape": {"T": 8},
        "implementations": [ours, rival],
    }
    late = {**problem, "implementations": [{**ours, "timing": {"median": 5e-4, "late": 3}}]}
    refused = {**problem, "implementations": [{**ours, "timing": None, "note": "wrong: by 3"}]}
    tests = {"failed": [{"test": "test_x.py::test_y", "message": "assert 1 == 2"}]}
    parts = {"tests": tests, "entropy": {"problems": [problem, late, refused]}}
    steps = []
    for name, part in parts.items():
        (tmp_path / name).write_text(json.dumps(part))
        steps.append(Step(name, (), 1, 2, tmp_path / name))
    kept = record.Record(tmp_path / "device.json", steps)
    for one in steps:
        kept.read(one)
    table = kept.table()
    assert "failed: test_x.py::test_y: assert 1 == 2" in table
    assert "500.0 us" in table and "liger 2.00 x" in table
    assert "(waits for the host)" in table and "wrong: by 3" in table
    assert max(map(len, table.splitlines())) <= 160


def test_pytest_files_are_counted_each_in_its_process(tmp_path: Path) -> None:
    """Fails if a file that crashes or hangs hides the others' results, or passes."""
    (tmp_path / "test_good.py").write_text(
        "def test_a(): pass\ndef test_b(): assert 0, 'b is bad'\n"
    )
    (tmp_path / "test_crash.py").write_text("import os\ndef test_c(): os._exit(7)\n")
    target = tmp_path / "tests.json"
    paths = [str(tmp_path / f"test_{name}.py") for name in ("good", "crash")]
    passed = device_tests.run(paths, 2, PATIENCE, target, gpu=False)
    found = json.loads(target.read_text())
    assert not passed and found["passed"] == 1
    assert [(test["test"], test["message"]) for test in found["failed"]] == [
        ("test_good.py::test_b", "AssertionError: b is bad")
    ]
    ends = {Path(file["file"]).stem: file["status"] for file in found["files"]}
    assert ends == {"test_good": 1, "test_crash": 7}


def test_a_file_that_hangs_is_ended(tmp_path: Path) -> None:
    """Fails if the tests of a kernel that never ends take all the time there is."""
    (tmp_path / "test_hang.py").write_text("import time\ndef test_d(): time.sleep(600)\n")
    target, paths = tmp_path / "tests.json", [str(tmp_path / "test_hang.py"), "test_later.py"]
    assert not device_tests.run(paths, 1, 0.5, target, gpu=False)
    found = json.loads(target.read_text())
    assert [file["status"] for file in found["files"]] == ["timed out"]
    assert found["not_run"] == ["test_later.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be > 0"),
        (["--workers", "-1"], "--workers must be > 0"),
        (["--output", "Makefile"], "is a file, not a directory"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a mistake costs minutes on a device before it is noticed."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        command.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_step_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a mistyped step is left out of a run in silence."""
    assert command.main(["grpo_los"]) == 2
    assert "unknown step 'grpo_los'" in capsys.readouterr().err


def on_cpu(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.device", "--device", "cpu", "--output", str(output),
         "--workers", "1", "--seconds", str(10 * PATIENCE), "--commit", "f" * 40, *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip


def check_results(done: subprocess.CompletedProcess[str], output: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + (output / "log.txt").read_text()[-3000:]
    document: dict[str, Any] = json.loads((output / "device.json").read_text())
    assert document["header"]["commit"] == "f" * 40 and document["header"]["dirty"] is False
    (problem,) = document["ops"]["grpo_loss"]["problems"]
    assert problem["implementations"][0]["status"] == "timed"
    assert "grpo_loss both B=64 T=1024" in done.stdout
    return document


def test_the_way_through_it_on_a_cpu(tmp_path: Path) -> None:
    """Fails if facts, one op and the merged file do not come together as on a device."""
    document = check_results(on_cpu(tmp_path, "grpo_loss"), tmp_path)
    assert statuses(document) == {"machine": "passed", "grpo_loss": "passed"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.json", "log.txt"]


@pytest.mark.slow
def test_all_steps_on_a_cpu(tmp_path: Path) -> None:
    """Fails if the tests' step, the probes or another op do not."""
    chosen = ("probes", "tests", *plan.CPU_OPS)
    document = check_results(on_cpu(tmp_path, *chosen), tmp_path)
    assert set(statuses(document).values()) == {"passed"}
    assert document["tests"]["passed"] > 20 and document["tests"]["failed"] == []
