"""The command line: `regraft`. Heavy imports happen inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from regraft.errors import RegraftError

app = typer.Typer(
    name="regraft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Fine-tune language models continuously.

One YAML describes an experiment: base model, data, methods to try, how to choose, serve, watch and retrain.
Start with `regraft quickstart`, which runs the whole loop on the bundled example, then point the same
commands at your own folder.

`sweep` trains and chooses · `serve` answers · `drift` watches · `retrain` mends · `up` keeps it all running.
""",
)
EXAMPLE = Path("examples/utility-support")
ExperimentPath = Annotated[
    Path, typer.Argument(help="A regraft.yaml, or the folder that holds one.", show_default=True)
]


@app.command()
def quickstart(path: ExperimentPath = EXAMPLE) -> None:
    """Run the whole loop, from data to a retrained, served model.

    Starts MLflow and a local Ray cluster, sweeps the methods, registers and serves the winner, replays an
    ordinary week and a storm week, detects the drift, retrains, and swaps the champion. Ends everything it
    started. Run again, it finds what is finished.
    """
    from jobs.quickstart import run

    run(path)


@app.command()
def check(
    path: ExperimentPath = EXAMPLE,
    cards: Annotated[
        bool, typer.Option(help="Also say how each trial fits on GPUs of 24, 48 and 80 GB.")
    ] = False,
) -> None:
    """Validate an experiment whole and print what it would do, without starting anything.

    For each trial: predicted peak memory with its largest parts, predicted time of training, and what would
    make it fit if it does not. With `--cards`, `model.source` may be a folder with a config.json alone.
    """
    from jobs.check import run

    run(path, cards=cards)


@app.command()
def schema() -> None:
    """Print the JSON schema of regraft.yaml, for editors."""
    from jobs.reference import schema as text

    typer.echo(text())


@app.command()
def sweep(
    path: ExperimentPath = EXAMPLE,
    promote: Annotated[bool, typer.Option(help="Put the winner before the gate.")] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist that this very sweep was begun before.")
    ] = False,
) -> None:
    """Try the methods, rank them, and promote the winner if it beats the champion (or the control).

    A sweep that was cut short goes on when it is started again, with or without `--resume`: finished trials
    are found in MLflow and not run again, others go on from their last checkpoint. On a cluster whose nodes
    have Regraft installed, submit the same as a job; the folder travels with it:

    `ray job submit --address http://HEAD:8265 --working-dir FOLDER -- regraft sweep .`
    """
    from jobs.sweep import run

    run(path, promote=promote, resume=resume)


@app.command()
def evaluate(
    path: ExperimentPath = EXAMPLE,
    version: Annotated[int | None, typer.Argument(help="A version; the champion if not given.")] = None,
) -> None:
    """Measure a version on today's evaluation sets: figures with intervals, weakest kinds, speed.

    It answers the part of each set that candidates are not chosen by, of the sets in the YAML and of those
    that earlier versions were promoted by, alone on its worker. What came of it is a run in MLflow.
    """
    from jobs.evaluate import run

    run(path, version)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run ids of trials, as MLflow shows them; two or more.")],
    path: Annotated[
        Path, typer.Option("--experiment", "-e", help="A regraft.yaml, or the folder that holds one.")
    ] = EXAMPLE,
    answers: Annotated[int, typer.Option(help="How many examples to show with all answers.")] = 3,
) -> None:
    """Lay trials side by side: what was set otherwise, figures, paired differences, answers.

    The others are held against the first. Differences are over the examples that both answered, with the
    interval of a paired bootstrap; a star marks those that leave zero out.
    """
    from jobs.compare import run

    run(path, runs, answers=answers)


@app.command()
def serve(
    path: ExperimentPath = EXAMPLE,
    config: Annotated[
        Path | None,
        typer.Option(help="Write the config for `serve deploy` there instead; - prints it.", metavar="FILE"),
    ] = None,
) -> None:
    """Serve the champion behind an OpenAI-compatible API until interrupted.

    With `--config` nothing is started: what is written puts the same endpoint up on a Ray cluster, for good:

    `regraft serve . --config serve.yaml && serve deploy serve.yaml --address http://HEAD:8265`
    """
    from jobs.serve import run, write_config

    if config is None:
        run(path)
    else:
        write_config(path, config)


@app.command()
def drift(
    path: ExperimentPath = EXAMPLE,
    start: Annotated[datetime | None, typer.Option(help="Exchanges from here on (UTC).")] = None,
    end: Annotated[datetime | None, typer.Option(help="Exchanges before here (UTC).")] = None,
    act: Annotated[bool, typer.Option(help="Carry decisions out: retrain, roll back, collect.")] = True,
) -> None:
    """Check what the endpoint answered since the last check against the champion's frozen reference; decide.

    Windows that the schedule has missed are caught up, and the last one is closed now. Each check adds to the
    evidence; the alarm is raised when there is enough of it. With --start or --end a stretch of time is only
    looked at: nothing is counted, decided or logged.

    The services must be running (`regraft up`, or a cluster named in the YAML).
    """
    from datetime import UTC

    from jobs.check_drift import run

    run(
        path,
        start=start.replace(tzinfo=UTC) if start else None,
        end=end.replace(tzinfo=UTC) if end else None,
        act=act,
    )


@app.command()
def retrain(
    path: Annotated[Path, typer.Argument(help="A regraft.yaml, or the folder that holds one.")],
    decision: Annotated[str, typer.Argument(help="Id of a decision that `regraft drift` recorded.")],
) -> None:
    """Carry out a retraining decision here and now; normally a Ray job does."""
    from jobs.retrain import run

    run(path, decision)


@app.command()
def rollback(
    path: ExperimentPath, version: Annotated[int, typer.Argument(help="The version to go back to.")]
) -> None:
    """Point the champion alias to an earlier version; the endpoint follows."""
    from jobs.rollback import run

    run(path, version)


@app.command()
def parity(
    path: ExperimentPath,
    version: Annotated[int, typer.Argument(help="The version to ask, as MLflow's Models page numbers it.")],
    prompts: Annotated[int, typer.Option(min=1, help="Evaluation prompts to ask, evenly chosen.")] = 8,
) -> None:
    """Ask a version the same in every way it may be run, and see that it answers the same.

    Greedy answers of the adapter on its base are held against those of the serving engine, of the adapter
    merged into the base, and those that its evaluation recorded. Where two part, both tokens must be equally
    likely but for rounding, which counts as a tie. Runs here, with one model in memory at a time; exits with
    status 1 if an answer differs.
    """
    from jobs.parity import run

    if not run(path, version, limit=prompts):
        raise typer.Exit(1)


@app.command()
def up(path: ExperimentPath = EXAMPLE) -> None:
    """Bring MLflow, Ray, the endpoint and the monitor up, print their URLs, and leave them running."""
    from jobs.up import up as run

    run(path)


@app.command()
def down() -> None:
    """End what `up` started."""
    from jobs.up import down as run

    run()


monitor_app = typer.Typer(no_args_is_help=True, help="The drift monitor.")
app.add_typer(monitor_app, name="monitor")


@monitor_app.command("run")
def monitor_run(path: ExperimentPath = EXAMPLE) -> None:
    """Check for drift every `monitor.every_seconds`, until interrupted; alarms become retraining jobs.

    Checks are at even times, on the hour for 3600, whenever this was started; what was missed is caught up.
    A workspace has one for each model. SIGTERM ends it after the round under way. If MLflow or Ray are away
    it says so and tries again, ever less often.
    """
    from jobs.monitor import run

    run(path)


@monitor_app.command("once")
def monitor_once(path: ExperimentPath = EXAMPLE) -> None:
    """Check what is due, decide, and end: with status 0, or 3 on an alarm. For cron and its like.

    What earlier calls missed is caught up; where nothing is due, nothing is done.
    """
    from jobs.monitor import ALARM, once

    if once(path):
        raise typer.Exit(ALARM)


@monitor_app.command("deploy")
def monitor_deploy(path: ExperimentPath = EXAMPLE) -> None:
    """Have the Ray cluster watch: `monitor run` as a detached actor, which is restarted wherever it dies.

    The folder must lie at the same place on all nodes. If one watches already, it is left as it is: after a
    change of `monitor.every_seconds`, or a new release, stop it first.
    """
    from jobs.monitor_actor import run_deploy

    run_deploy(path)


@monitor_app.command("status")
def monitor_status(path: ExperimentPath = EXAMPLE) -> None:
    """Say what watches a model, its last round, its next and the last verdict; status 1 if nothing does."""
    from jobs.monitor_actor import run_status

    if not run_status(path):
        raise typer.Exit(1)


@monitor_app.command("stop")
def monitor_stop(path: ExperimentPath = EXAMPLE) -> None:
    """End what watches a model, after its round: this workspace's process, and the actor of its cluster."""
    from jobs.monitor_actor import run_stop

    run_stop(path)


captures_app = typer.Typer(no_args_is_help=True, help="What the endpoint answered: its captured exchanges.")
app.add_typer(captures_app, name="captures")


@captures_app.command("ship")
def captures_ship(path: ExperimentPath = EXAMPLE) -> None:
    """Write the finished files of the capture spool as Parquet to `serve.capture.ship`, and delete them.

    The endpoint does so by itself every `serve.capture.ship_every_seconds`; this is for what an endpoint
    left behind that no longer runs. Cut short, it goes on where it was when run again.
    """
    from jobs.captures import ship
    from regraft.config import Experiment

    ship(Experiment.load(path))


@captures_app.command("prune")
def captures_prune(path: ExperimentPath = EXAMPLE) -> None:
    """Delete the exchanges, in spool and archive, that are older than `serve.capture.keep_days`."""
    from jobs.captures import prune
    from regraft.config import Experiment

    prune(Experiment.load(path))


@captures_app.command("stats")
def captures_stats(path: ExperimentPath = EXAMPLE) -> None:
    """Count the captured exchanges by version, and say where they lie."""
    from jobs.captures import stats
    from regraft.config import Experiment

    stats(Experiment.load(path))


keys_app = typer.Typer(no_args_is_help=True, help="Who may ask the endpoint: its API keys.")
app.add_typer(keys_app, name="keys")


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="Whose key, or what for; up to 64 characters.")],
    path: ExperimentPath = EXAMPLE,
    scopes: Annotated[
        str, typer.Option(help="With commas between: use (ask models), feedback (judge answers), admin.")
    ] = "use",
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Its own limit; else `serve.limits` counts.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of prompts and answers; else `serve.limits` counts.")
    ] = None,
    expires: Annotated[datetime | None, typer.Option(help="From when on it no longer counts (UTC).")] = None,
) -> None:
    """Make a key in the file that `serve.keys` names, and print it, this once.

    Only its hash is kept. The key alone goes to the standard output, so that it can be put away unseen:

    `regraft keys create . --name shop --scopes use,feedback > shop.key`

    Clients send it as `Authorization: Bearer KEY`. A running endpoint knows it at once.
    """
    from datetime import UTC

    from jobs.keys import create
    from regraft.serve_sections import LimitsSection

    limits = LimitsSection(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
    create(path, name, scopes, expires.replace(tzinfo=UTC) if expires else None, limits)


@keys_app.command("list")
def keys_list(path: ExperimentPath = EXAMPLE) -> None:
    """List the keys: ids, names, scopes, limits, and whether they still count."""
    from jobs.keys import show

    show(path)


@keys_app.command("revoke")
def keys_revoke(
    path: ExperimentPath, id: Annotated[str, typer.Argument(help="Its eight digits, from `keys list`.")]
) -> None:
    """Make a key count no more; a running endpoint refuses it from its next request on."""
    from jobs.keys import revoke

    revoke(path, id)


def _version(show: bool) -> None:
    if show:
        from regraft import __version__

        typer.echo(f"regraft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error that a user can mend is printed without a traceback, with status 2."""
    _guarded(app)


def run_script(work: Callable[[], object], usage: str, *, arguments: int) -> None:
    """Run a stage as a script, with the same treatment of errors."""
    if len(sys.argv) != arguments + 1 or {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"usage: {usage}\n")
        sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    _guarded(work)


def _guarded(work: Callable[[], object]) -> None:
    try:
        work()
    except RegraftError as error:
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
