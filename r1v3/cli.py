"""The command line: one verb per stage. Heavy modules are imported inside the verbs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="The Skywork-R1V3 recipe: SFT, GRPO, connector tuning, selection, evaluation.",
)
INTERRUPTED = 130
# How a verb goes on that was interrupted.
RESUME = "go on with --resume"
AGAIN = "start it again to go on"
# Packages that only some verbs need, and the extra that brings them.
EXTRAS = {
    "sklearn": "demo",
    "matplotlib": "demo",
    "megatron": "megatron",
    "starlette": "serve",
    "uvicorn": "serve",
    "py3langid": "distill",
    "datasketch": "distill",
}

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the stage.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value or section.key=value overrides.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]


@contextmanager
def _friendly(go_on: str = "") -> Iterator[None]:
    """User errors become one line on stderr and exit code 1; an interruption exits with 130.

    `go_on` tells how a verb goes on that was interrupted; without it, nothing is left to go on.
    """
    from r1v3.trainer.interrupt import StageInterrupted

    try:
        yield
    except typer.Exit:
        raise
    except StageInterrupted as stopped:
        typer.secho(str(stopped), fg="yellow", err=True)
        raise typer.Exit(INTERRUPTED) from stopped
    except KeyboardInterrupt as stopped:
        kept = go_on and f"; what was saved is kept: {go_on}"
        typer.secho(f"interrupted{kept}", fg="yellow", err=True)
        raise typer.Exit(INTERRUPTED) from stopped
    except (ValueError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        typer.secho(_error_line(error), fg="red", err=True)
        raise typer.Exit(1) from error


def _error_line(error: Exception) -> str:
    """The message of an error; in a job of several ranks with the rank, and a lost peer by name."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if extra := EXTRAS.get(error.name.partition(".")[0]):
            text += f"; pip install 'r1v3[{extra}]'"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return f"error: {text}"
    from r1v3.ranks import is_lost_peer

    if is_lost_peer(error):
        text = f"another rank has died or hangs; checkpoints are kept: {RESUME} ({text})"
    return f"error: rank {os.environ['RANK']}: {text}"


def _echo(result: object) -> None:
    """Print a result once, not on every rank of a job."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(result)


def _require_begun(name: str, run: Path, resuming: bool) -> None:
    """`--resume` is for a stage that was started; anything else is most likely a misspelled run."""
    if resuming and not (run / "config" / f"{name}.yaml").is_file():
        raise ValueError(
            f"{run} holds no stage {name} to resume; start without --resume, or check run=..."
        )


@app.command(
    epilog="Example: r1v3 demo --seed 1    Interrupted? r1v3 demo --resume",
)
def demo(
    run: Annotated[
        Path | None, typer.Option(help="Run folder; by default the next free runs/demo-N.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data, training and evaluation.")] = 0,
    configs: Annotated[Path, typer.Option(help="Folder of the stages' files.")] = Path(
        "configs/demo"
    ),
    resume: Resume = False,
) -> None:
    """The whole recipe on handwritten digits, in minutes on a laptop, with a report at the end."""
    with _friendly(RESUME):
        from r1v3.demo import run_demo
        from r1v3.shipped_files import shipped

        run_demo(run, seed, shipped(configs), resuming=resume)


@app.command(
    epilog="Example: r1v3 data configs/demo/data.yaml run=runs/mine sft=2000    "
    "Your own rows: r1v3 data check rows.parquet --model runs/mine/models/sft"
)
def data(
    config: Annotated[Path, typer.Argument(help="YAML file of the stage, or `check`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides, or the files to check.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="With check: also count the tokens of this model.")
    ] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="With check: as in a stage.")] = None,
    truncated: Annotated[
        Literal["error", "accept", "skip"], typer.Option(help="With check: as in a stage.")
    ] = "error",
) -> None:
    """Build the datasets of the handwriting recipe; or check files of your own rows.

    `r1v3 data check FILE` prints what stages will read of a file: its columns, pictures and tiles,
    the lengths of its prompts, and every wrong row. It exits with 1 if there is one.
    """
    with _friendly():
        if str(config) == "check":
            from r1v3.evaluation.data_check import check_files

            files = [Path(file) for file in overrides or []]
            if not check_files(files, model=model, max_tiles=max_tiles, truncated=truncated):
                raise typer.Exit(1)
            return
        from r1v3.config import Data, load
        from r1v3.data.recipe import build

        build(load(Data, config, overrides or []), typer.echo)


@app.command(
    epilog="Example: r1v3 sft configs/demo/sft.yaml run=runs/mine optimizer.learning_rate=1e-3"
)
def sft(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Cold-start supervised fine-tuning (and, from an architecture, pre-training)."""
    with _friendly(RESUME):
        from r1v3.config import SFT, load

        loaded = load(SFT, config, overrides or [])
        _require_begun("sft", loaded.run, resume)
        from r1v3.local_job import local_job
        from r1v3.trainer import sft as stage

        with local_job(loaded, stage.train, loaded, resuming=resume):
            _echo(stage.train(loaded, resuming=resume))


@app.command(epilog="Example: r1v3 grpo configs/demo/grpo.yaml run=runs/mine loss.clip_high=0.28")
def grpo(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Group relative policy optimization."""
    with _friendly(RESUME):
        from r1v3.config import GRPO, load

        loaded = load(GRPO, config, overrides or [])
        _require_begun("grpo", loaded.run, resume)
        from r1v3.local_job import local_job
        from r1v3.trainer import grpo as stage

        with local_job(loaded, stage.train, loaded, resuming=resume):
            _echo(stage.train(loaded, resuming=resume))


@app.command(epilog="Example: r1v3 connector configs/demo/connector.yaml run=runs/mine")
def connector(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Connector-only tuning."""
    with _friendly(RESUME):
        from r1v3.config import Connector, load

        loaded = load(Connector, config, overrides or [])
        _require_begun("connector", loaded.run, resume)
        from r1v3.local_job import local_job
        from r1v3.trainer import connector as stage

        with local_job(loaded, stage.train, loaded, resuming=resume):
            _echo(stage.train(loaded, resuming=resume))


@app.command(epilog="Example: r1v3 select configs/demo/select.yaml run=runs/mine")
def select(config: ConfigFile, overrides: Overrides = None) -> None:
    """Choose a checkpoint by critical-token entropy, the validation score beside it."""
    with _friendly():
        from r1v3.config import Select, load
        from r1v3.trainer.selection import select_from_run

        typer.echo(select_from_run(load(Select, config, overrides or [])))


@app.command("eval", epilog="Example: r1v3 eval configs/demo/eval.yaml run=runs/mine name=grpo")
def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Score one checkpoint in all decoding modes."""
    with _friendly(AGAIN):
        from r1v3.config import Evaluate, load
        from r1v3.evaluation.evaluate import evaluate as run_evaluation
        from r1v3.local_job import local_job

        def show(mode: str, result: dict[str, Any]) -> None:
            for where in ("in_domain", "out_of_domain"):
                if score := result[where]:
                    typer.echo(
                        f"{mode:<12} {where:<14} {score['accuracy']:.3f} "
                        f"[{score['low']:.3f}, {score['high']:.3f}]  {score['tokens']:.1f} tokens"
                    )

        loaded = load(Evaluate, config, overrides or [])
        with local_job(loaded, run_evaluation, loaded):
            run_evaluation(loaded, show)


@app.command(
    epilog="Example: r1v3 suite configs/suite/tiny.yaml data=LMUData samples=2    "
    "Again, without asking: r1v3 suite configs/suite/tiny.yaml --score"
)
def suite(
    config: ConfigFile,
    overrides: Overrides = None,
    score: Annotated[
        bool, typer.Option("--score", help="Ask nothing; score the answers that are there.")
    ] = False,
) -> None:
    """Run and score the report's public benchmarks; started again, it asks what is missing."""
    with _friendly(AGAIN):
        from r1v3.config import Suite, load
        from r1v3.local_job import local_job
        from r1v3.suite.run import run_suite, score_suite

        loaded = load(Suite, config, overrides or [])
        if score:
            score_suite(loaded)
            return
        with local_job(loaded, run_suite, loaded):
            run_suite(loaded)


@app.command(
    epilog="Example: r1v3 distill configs/distill/demo.yaml limit=50 --estimate    "
    "Interrupted? Start it again"
)
def distill(
    config: ConfigFile,
    overrides: Overrides = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Ask nothing; print what it would cost.")
    ] = False,
    build: Annotated[
        bool, typer.Option("--build", help="Ask nothing; build from the answers that are there.")
    ] = False,
) -> None:
    """Make cold-start data from a teacher's answers; started again, it asks what is missing."""
    with _friendly(AGAIN):
        from r1v3.config import Distill, load
        from r1v3.distill.run import run_distill

        run_distill(
            load(Distill, config, overrides or []), estimate_only=estimate, build_only=build
        )


@app.command(
    epilog="Example: r1v3 study configs/studies/demo/modes.yaml --quick    "
    "All, sharing their runs: r1v3 study configs/studies/demo/*.yaml"
)
def study(
    files: Annotated[list[Path], typer.Argument(help="YAML files of studies.")],
    out: Annotated[Path, typer.Option(help="Folder of runs and results.")] = Path("runs/studies"),
    quick: Annotated[
        bool, typer.Option("--quick", help="The quick form: one seed, fewer steps.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default what the cores can hold.")
    ] = None,
    print_: Annotated[
        bool, typer.Option("--print", help="Run nothing; print one command per run.")
    ] = False,
) -> None:
    """Run experiments of the report and judge its findings; started again, it goes on."""
    with _friendly(AGAIN):
        from r1v3.study.run import run_studies

        if not run_studies(files, out, quick=quick, jobs=jobs, printing=print_):
            raise typer.Exit(1)


@app.command(
    epilog="Example: r1v3 generate --checkpoint runs/demo-1 --image digits.png "
    '--question "Compute the result." --mode slow --budget 40'
)
def generate(
    checkpoint: Annotated[Path, typer.Option(help="Run folder or model folder.")],
    image: Annotated[Path, typer.Option(help="Picture to look at.")],
    question: Annotated[str, typer.Option(help="What to ask.")],
    mode: Annotated[str, typer.Option(help="slow, nothink or nowait.")] = "slow",
    budget: Annotated[
        int | None, typer.Option(min=0, help="Close the thought after this many tokens.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Most tiles; by default the model's own number.")
    ] = None,
    ground: Annotated[
        Literal["white", "black"], typer.Option(help="What transparency is laid on.")
    ] = "white",
) -> None:
    """Answer a question about a picture of your own."""
    with _friendly():
        from r1v3.evaluation.generate import answer_about_image

        answer_about_image(
            checkpoint,
            image,
            question,
            mode=mode,
            budget=budget,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            max_tiles=max_tiles,
            ground=ground,
        )


@app.command(
    epilog="Example: r1v3 serve runs/demo-1 port=8001 rows=32    "
    "For a large model: r1v3 serve r1v3-38b --vllm"
)
def serve(
    model: Annotated[Path, typer.Argument(help="Run folder or model folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value settings; docs/serve.md lists them.")
    ] = None,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Only print how vLLM serves it, in every mode.")
    ] = False,
) -> None:
    """An OpenAI-compatible endpoint with a chat page, for any client of such servers."""
    with _friendly():
        from r1v3.config import Serve, load
        from r1v3.shipped_files import shipped

        config = load(Serve, None, [f"model={shipped(model)}", *(overrides or [])])
        if vllm:
            from r1v3.serve.vllm import vllm_guide

            typer.echo(vllm_guide(config))
            return
        from r1v3.serve.run import run_server

        run_server(config, typer.echo)


@app.command(
    epilog="Example: r1v3 convert Skywork-R1V3-38B r1v3-38b-native --to native    "
    "Back: r1v3 convert runs/mine/models/grpo out --to original --max-shard-size 2GB"
)
def convert(
    source: Annotated[Path, typer.Argument(help="Model folder in either layout.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    to: Annotated[
        Literal["native", "original"],
        typer.Option(
            help="native: transformers' InternVLForConditionalGeneration; "
            "original: the remote code's InternVLChatModel and SkyworkR1VChatModel."
        ),
    ],
    max_shard_size: Annotated[
        str, typer.Option(help="Of a weight file, such as 4GiB or 500MB.")
    ] = "4GiB",
) -> None:
    """Convert a checkpoint between key layouts, bit for bit, in constant memory."""
    with _friendly():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        from r1v3.files import human_bytes, parse_bytes
        from r1v3.model.conversion import convert as run_conversion

        limit = parse_bytes(max_shard_size)
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
        terminal = Console().is_terminal
        with Progress(*columns, transient=True, disable=not terminal) as bars:
            task = bars.add_task("converting", total=None)
            done = run_conversion(
                source,
                target,
                to,
                max_shard_bytes=limit,
                progress=lambda written, total: bars.update(task, completed=written, total=total),
            )
        typer.echo(
            f"{target}: {done.tensors} tensors, {human_bytes(done.bytes)}, "
            f"weight files: {len(done.files)}"
        )
        for name in done.ignored:
            typer.echo(f"left out: {name} (the model computes it)")
        for note in done.notes:
            typer.echo(f"note: {note}")


@app.command(epilog="Example: r1v3 plan configs/r1v3-38b/grpo_4k.yaml --gpus 64")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the whole job.")] = 8,
    memory_gb: Annotated[float, typer.Option(min=1, help="Of one GPU, in 10^9 bytes.")] = 80.0,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Prompt and response, instead of the configured.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt besides images.")] = 512,
    tflops: Annotated[float, typer.Option(min=1, help="Sustained by one GPU.")] = 400.0,
    stage: Annotated[
        str | None, typer.Option(help="sft, grpo, connector or eval; by default the file's name.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers here.")] = None,
) -> None:
    """Say what a stage needs of every GPU before it starts, and what would make it fit."""
    with _friendly():
        from r1v3.plan.job import Cluster
        from r1v3.plan.run import run_plan

        fits = run_plan(
            config,
            overrides or [],
            Cluster(gpus, memory_gb * 1e9, tflops * 1e12),
            stage=stage,
            sequence_length=sequence_length,
            text_tokens=text_tokens,
            json_file=json,
        )
        if not fits:
            raise typer.Exit(1)


@app.command(epilog="Example: r1v3 report runs/demo-1")
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Draw the figures and write report.html of a run again."""
    with _friendly():
        from r1v3.report.page import write_report

        typer.echo(write_report(run))


@app.command(epilog="Example: r1v3 doctor")
def doctor() -> None:
    """Say what is installed, what runs on what, and what is missing."""
    with _friendly():
        from r1v3.doctor import healthy, print_report
        from r1v3.doctor import report as examine

        checks = examine()
        print_report(checks)
        if not healthy(checks):
            raise typer.Exit(1)


def main() -> None:
    """Entry point of the `r1v3` command."""
    # libgomp reads it when torch is loaded. Threads that spin while they wait take the cores from
    # other programs, and from each other; one's own setting (also GOMP_SPINCOUNT) wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
