"""The command line: the platform's processes, and the same steps without Airflow."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from neuroloop.core.errors import NeuroLoopError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def up(build: Annotated[bool, typer.Option(help="Build a first model when there is none.")] = True) -> None:
    """Start the whole platform on this machine; ends when a model serves."""
    from neuroloop.embedded.stack import Stack

    stack = Stack(say=_progress())
    stack.up(build=build)
    print(f"\nNeuroLoop is up. For research only; not a medical device.\n{stack.summary()}")


@app.command()
def down() -> None:
    """Stop every process of the platform; the state stays."""
    from neuroloop.embedded.stack import Stack

    Stack().down()
    print("stopped")


@app.command()
def status() -> None:
    """Each part and its state; exits with 1 unless all are healthy."""
    from neuroloop.embedded.stack import Stack

    stack = Stack()
    states = stack.status()
    for name, state in states.items():
        print(f"{name:14} {state}")
    if not all("running, healthy" in state for state in states.values()):
        raise typer.Exit(1)
    print(stack.summary())


@app.command()
def logs(lines: Annotated[int, typer.Option(help="Lines of each part.")] = 20) -> None:
    """The latest log lines of every part."""
    from neuroloop.core.settings import Settings

    folder = Settings.load().home / "logs"
    files = sorted(str(file) for file in folder.glob("*.log"))
    if not files:
        print(f"no logs yet in {folder}: run make up")
        return
    subprocess.run(["tail", "-n", str(lines), *files], check=False)


@app.command()
def trigger(
    dag: Annotated[str, typer.Argument(help="data_and_model_build or model_retraining")],
    params: Annotated[list[str] | None, typer.Argument(help="name=value, such as minutes=20")] = None,
) -> None:
    """Trigger a DAG in Airflow and follow it to its end."""
    from neuroloop.embedded.stack import Stack

    conf: dict[str, Any] = {}
    for param in params or ():
        name, separator, value = param.partition("=")
        if not separator:
            raise NeuroLoopError(f"{param!r} is not name=value", fix="write for example minutes=20")
        try:
            conf[name] = json.loads(value)
        except ValueError:
            conf[name] = value  # plain text, such as a path
    airflow, say = Stack().airflow(), _progress()
    airflow.follow(dag, airflow.trigger(dag, conf), say)


@app.command()
def role(name: str) -> None:
    """Become one process of the platform (what entrypoint.sh calls)."""
    from neuroloop.embedded.roles import become

    become(name)


@app.command()
def mail_sink() -> None:
    """Receive mails on loopback and keep them in the object store, for the Mail page."""
    from neuroloop.adapters.smtp import run_sink
    from neuroloop.bootstrap import services

    outside = services()
    run_sink(outside.store, outside.settings.bind, outside.settings.mail_port)


@app.command()
def build(
    data_url: Annotated[str, typer.Option(help="phantom://, a folder, gs://... or kaggle://...")] = "",
    minutes: Annotated[float | None, typer.Option(help="Training budget.")] = None,
    epochs: Annotated[int | None, typer.Option(help="An exact number of epochs.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the canonical image, pixels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of simulation, augmentation and training.")] = None,
) -> None:
    """Run the steps of data_and_model_build here, without Airflow."""
    from neuroloop.bootstrap import services
    from neuroloop.loop import pipeline

    outside, run_id = services(), f"cli-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    given = {"data_url": data_url, "minutes": minutes, "epochs": epochs, "image_size": image_size, "seed": seed}
    params = pipeline.Params.of(outside, given)
    with_params: list[Any] = [pipeline.check_source, pipeline.download_data]
    for step in with_params:
        _show(step(outside, run_id, params))
    _show(pipeline.audit_data(outside, run_id))
    _show(pipeline.capture_statistics(outside, run_id))
    for step in (pipeline.augment_input_data, pipeline.transform_testing_data, pipeline.building_model):
        _show(step(outside, run_id, params))
    for last in (pipeline.evaluate_model, pipeline.register_model, pipeline.promote_model, pipeline.send_email):
        _show(last(outside, run_id))


@app.command()
def pull(
    version: Annotated[str, typer.Option(help="Data version; empty: the one the champion was trained on.")] = "",
    to: Annotated[Path, typer.Option(help="Folder that gets data/ and data.dvc.")] = Path(),
) -> None:
    """Bring back exactly the images of a data version (dvc pull)."""
    from neuroloop.bootstrap import services
    from neuroloop.core import keys
    from neuroloop.core.errors import NotFound

    outside = services()
    if not version:
        champion = outside.registry.by_alias("champion")
        if champion is None:
            raise NotFound("there is no champion", fix="name a data version with --version")
        version = champion.tags["data_version"]
    outside.versions.restore(outside.store.get(keys.data_dvc(version)), to)
    print(f"data version {version} is in {(to / 'data').absolute()}")


def _progress() -> Callable[[str], None]:
    """Prints lines with the seconds since now before them."""
    started = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)


def _show(result: dict[str, Any]) -> None:
    print(result, flush=True)


def main() -> None:
    """Run a command; an error of ours is one line, not a stack trace."""
    try:
        app()
    except NeuroLoopError as error:
        print(f"neuroloop: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
