"""The command line: the platform's processes, and the same steps without Airflow."""

import contextlib
import getpass
import json
import logging
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from neuroloop.core.credentials import Role
from neuroloop.core.errors import InvalidSource, NeuroLoopError

if TYPE_CHECKING:
    from neuroloop.bootstrap import Services

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
keys = typer.Typer(help="API keys: who may use the inference API, and for what.", no_args_is_help=True)
app.add_typer(keys, name="keys")


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
def migrate(
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the database's port.")] = 60.0,
) -> None:
    """Bring the schema of NEUROLOOP_DATABASE_URL up to date; else whichever process comes first does it."""
    from neuroloop.bootstrap import services
    from neuroloop.embedded.roles import log_database, wait_for

    outside = services()
    outside.settings.require("database_url")
    wait_for(log_database(outside.settings), seconds=wait)
    for name in outside.migrate() or ["nothing to do"]:
        print(name)


@app.command()
def mail_sink() -> None:
    """Receive mails on loopback and keep them in the object store, for the Mail page."""
    from neuroloop.adapters.smtp import run_sink
    from neuroloop.bootstrap import services

    outside = services()
    run_sink(outside.store, outside.settings.bind, outside.settings.mail_port)


@app.command()
def build(
    data_url: Annotated[str, typer.Option(help="phantom://, a folder, gs://, s3://, az:// or kaggle://...")] = "",
    minutes: Annotated[float | None, typer.Option(help="Training budget.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="At most so many; the minutes or early stopping may end it sooner.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the canonical image, pixels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of simulation, augmentation and training.")] = None,
    architecture: Annotated[str, typer.Option(help="compact, plain64, xception, ...: see .env.example.")] = "",
    split: Annotated[str, typer.Option(help="grouped, or legacy: the source's own, leaks and all.")] = "",
    hyperparameters: Annotated[str, typer.Option(help="JSON, such as what `neuroloop search` found best.")] = "",
) -> None:
    """Run the steps of data_and_model_build here, without Airflow."""
    from neuroloop.loop import pipeline

    outside, run_id = _logged(), _new_run("cli")
    given: dict[str, Any] = {
        "data_url": data_url,
        "minutes": minutes,
        "epochs": epochs,
        "image_size": image_size,
        "seed": seed,
        "split": split,
    }
    given |= {"architecture": architecture, "hyperparameters": _json_object("--hyperparameters", hyperparameters)}
    params = pipeline.Params.of(outside, given)
    for name, result in pipeline.play(outside, run_id, params):
        print(name)
        _show(result)


@app.command()
def train_worker(
    run_id: Annotated[str, typer.Argument(help="The build or retraining, as Airflow or MLflow calls it.")],
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for its training to begin.")] = 3600.0,
) -> None:
    """Help to train on several hosts, on every one but the chief of TF_CONFIG; the chief alone leaves something."""
    from neuroloop.loop import hosts

    _show(hosts.assist(_logged(), run_id, wait=wait))


@app.command()
def search(
    data_url: Annotated[str, typer.Option(help="phantom://, a folder, gs://, s3://, az:// or kaggle://...")] = "",
    trials: Annotated[int, typer.Option(min=1, help="At most this many settings are tried.")] = 20,
    minutes: Annotated[float, typer.Option(help="And none after this time.")] = 60.0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of a trial.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the canonical image, pixels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of simulation, augmentation, training and the search.")] = None,
    architecture: Annotated[str, typer.Option(help="compact, plain64, xception, ...: see .env.example.")] = "",
    hyperparameters: Annotated[str, typer.Option(help="JSON: where to start from, instead of the defaults.")] = "",
) -> None:
    """Look for better hyper-parameters, by validation alone; each trial is an MLflow run below the search's."""
    from neuroloop.loop import pipeline
    from neuroloop.loop import search as searching

    outside, run_id = _logged(), _new_run("search")
    given = {"data_url": data_url, "image_size": image_size, "seed": seed, "architecture": architecture}
    params = pipeline.Params.of(
        outside, given | {"hyperparameters": _json_object("--hyperparameters", hyperparameters)}
    )
    try:
        with contextlib.closing(pipeline.play(outside, run_id, params)) as steps:
            for name, result in steps:
                print(name)
                _show(result)
                if name == "audit_data":  # the split is there, and a search wants no more
                    break
        logging.basicConfig(format="%(message)s")
        logging.getLogger("neuroloop").setLevel(logging.INFO)  # a line a trial
        most = epochs or searching.EPOCHS
        found = searching.search(outside, run_id, params, trials=trials, minutes=minutes, epochs=most)
    finally:
        pipeline.drop_shards(outside, run_id)
    _show({name: value for name, value in found.items() if name != "trials"})
    built = {name.replace("_", "-"): str(value) for name, value in given.items() if value not in (None, "")}
    built |= {"architecture": params.architecture, "hyperparameters": json.dumps(found["hyperparameters"])}
    words = " ".join(f"--{name} {shlex.quote(value)}" for name, value in built.items())
    print(f"Build with them: neuroloop build {words}")


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="Folder of images; folders below it count too.")],
    out: Annotated[Path, typer.Option(help="Table to write: .csv or .parquet")] = Path("predictions.csv"),
    api: Annotated[str, typer.Option(help="The API to ask; empty: NEUROLOOP_API_URL.")] = "",
    bundle: Annotated[
        Path | None, typer.Option(help="Predict here with this bundle instead, without a record.")
    ] = None,
    consent: Annotated[str, typer.Option(help="What to state: training, record, simulated or unstated.")] = "unstated",
    at_once: Annotated[int, typer.Option(min=1, max=32, help="Requests at a time.")] = 4,
) -> None:
    """Classify every image of a folder into a table, through the API (with NEUROLOOP_API_KEY) or with a bundle.

    If it is stopped or the API goes away, the same command goes on where it was: no image is recorded twice.
    """
    from neuroloop.core.schemas import RESEARCH_NOTICE, Consent
    from neuroloop.core.settings import Settings
    from neuroloop.loop import folder_prediction

    if not folder.is_dir():
        raise InvalidSource(f"{folder} is no folder", fix="name the folder that holds the images")
    if consent not in get_args(Consent):
        raise NeuroLoopError(f"{consent!r} is no consent", fix=f"state one of {', '.join(get_args(Consent))}")
    if bundle is None:
        settings = Settings.load()
        key = settings.api_key or settings.ui_api_key
        ask = folder_prediction.through_api(api or settings.api_url, key, consent)
    else:
        ask = folder_prediction.with_bundle(bundle)
    _writable(out)
    work = folder_prediction.Work.on(folder, out, asked=str(bundle or api), consent=consent)
    with typer.progressbar(length=len(work.files), label=f"{len(work.files):,} files", file=sys.stderr) as bar:
        counts = work.do(ask, at_once=at_once, done=bar.update)
    print(f"{', '.join(f'{count:,} {what}' for what, count in counts.items())}; written to {out}")
    print(RESEARCH_NOTICE)


@app.command()
def rollback(
    to: Annotated[str, typer.Option(help="Registered model version; empty: the champion before.")] = "",
    reason: Annotated[str, typer.Option(help="Stands in the ledger.")] = "rolled back from the command line",
    by: Annotated[str, typer.Option(help="Who does it; empty: the user of this shell.")] = "",
) -> None:
    """Make the previous champion, or another version, the champion again; servers follow within seconds."""
    from neuroloop.bootstrap import services
    from neuroloop.serving.rollback import make_champion

    row = make_champion(services(), to or None, by=by or getpass.getuser(), reason=reason)
    print(row.reason)


@app.command()
def sweep(
    force: Annotated[bool, typer.Option("--force", help="Remove leftovers however many they are.")] = False,
) -> None:
    """Finish erasures, keep the retention, remove what crashes left behind (what the DAG housekeeping does)."""
    from neuroloop.loop.housekeeping import tidy

    _show(tidy(_logged(), force=force))


@app.command()
def backup(
    to: Annotated[str, typer.Argument(help="Folder or URL below which the backup gets a folder of its own.")],
) -> None:
    """Back up both databases and the store, with hashes, while the platform runs (docs/operations.md)."""
    from neuroloop import bootstrap
    from neuroloop.records import backup as backups

    outside, url = _logged(), _below(_url(to), f"neuroloop-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    if f"{url}/".startswith(f"{outside.settings.store}/"):
        raise NeuroLoopError("a backup cannot lie in the store it is of", fix="name another folder or bucket")
    os.umask(0o077)  # it is as confidential as what it holds
    target, elsewhere = bootstrap.open_store(url), outside.settings.mlflow_elsewhere
    made = backups.backup(outside.databases, outside.store, target, say=_progress(), mlflow_elsewhere=elsewhere)
    print(f"{url}: {made.rows:,} rows, {len(made.objects):,} objects, {made.size / 1e6:,.1f} MB")
    if made.missing:
        print(f"{len(made.missing)} images that rows name were not in the store, such as {made.missing[0]}")
    if elsewhere:
        print(
            f"WITHOUT THE MODELS: MLflow keeps its files in {elsewhere}, outside of the store; back that up by itself"
        )


@app.command()
def restore(
    source: Annotated[str, typer.Argument(help="Folder or URL of one backup: .../neuroloop-20260101T120000Z")],
) -> None:
    """Bring a backup back into an empty store and empty databases, comparing every hash (docs/operations.md)."""
    from neuroloop import bootstrap
    from neuroloop.records import backup as backups

    outside = _logged()
    held = backups.restore(outside.databases, outside.store, bootstrap.open_store(_url(source)), say=_progress())
    print(f"restored as of {held.made_at:%Y-%m-%d %H:%M:%S} UTC: {held.rows:,} rows, {len(held.objects):,} objects")
    if held.mlflow_elsewhere:
        print(
            f"WITHOUT THE MODELS: MLflow kept its files in {held.mlflow_elsewhere}, outside of the store;"
            " NEUROLOOP_MLFLOW_ARTIFACTS_URL has to name that place, or a copy of it"
        )


@app.command()
def pull(
    version: Annotated[str, typer.Option(help="Data version; empty: the one the model was trained on.")] = "",
    model: Annotated[str, typer.Option(help="Registered model version; empty: the champion.")] = "",
    to: Annotated[Path, typer.Option(help="Folder that gets data/ and data.dvc.")] = Path(),
) -> None:
    """Bring back exactly the images of a data version (dvc pull), every one verified.

    With a retrained model come its corrections; those that were erased or taken back since are counted.
    """
    from neuroloop.bootstrap import services
    from neuroloop.loop import versions

    found = versions.restore(services(), to, version=version, model=model)
    print(f"data version {found.version} is in {(to / 'data').absolute()}")
    if found.corrections or found.missing:
        print(f"{found.corrections} corrections are in {(to / 'corrections').absolute()}, {found.missing} are gone")
    if found.unknown:
        print("the model also learned from corrections; which, an earlier version of this program did not keep")


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="Folder of part/class/images or class/images.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the report for programs.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Where to write the report for people.")] = None,
) -> None:
    """Look for leaks, twins, wrong labels, wrong modality and shortcuts in any folder of images.

    Needs no setting and no other part of the platform, and changes nothing. Findings are no failure: it exits with 0.
    """
    from neuroloop.adapters.folder import FolderStore
    from neuroloop.loop.folder_audit import audit_folder

    if not folder.is_dir():
        raise InvalidSource(f"{folder} is no folder", fix="name the folder that holds part/class/images")
    for target in (json_file, html_file):
        if target:
            _writable(target)
    report = audit_folder(FolderStore(str(folder), follow_links=True), str(folder), say=_progress())
    for file, data in ((json_file, report.json_report), (html_file, report.html_report)):
        if file:
            file.write_bytes(data)
    found = report.audit
    print(f"\n{found.images:,} images, {len(set(found.groups.values())):,} groups, {len(found.quarantined)} unusable")
    for finding in report.findings:
        print(f"{finding.grade:8} {finding.what}")
    for file in (json_file, html_file):
        if file:
            print(f"written to {file}")


def _writable(file: Path) -> None:
    """Raise `NeuroLoopError` where a result could not be written, before any work is done for it."""
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder itself, or its folder is not there or not yours to write to"
        raise NeuroLoopError(f"{file} cannot be written", why=why, fix="name another place")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="The person or program it is for; verdicts carry this name.")],
    role: Annotated[Role, typer.Option(help="What it may do; docs/access.md has the table.")],
    days: Annotated[float | None, typer.Option(help="It expires after this; by default never.")] = None,
) -> None:
    """Make a key and print it, this once."""
    from neuroloop.bootstrap import services
    from neuroloop.serving import keyring

    print(keyring.create(services().keys, name, role, days=days, by="the command line").key)


@keys.command("list")
def list_keys() -> None:
    """All keys, newest first, those no longer valid included."""
    from neuroloop.bootstrap import services
    from neuroloop.serving import keyring

    for key in keyring.listed(services().keys):
        until = f"until {key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else ""
        print(
            f"{key.id}  {key.role:8}  {key.standing:7}  {key.created_at:%Y-%m-%d %H:%M}  {key.name}  {until}".rstrip()
        )


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The id that `keys list` shows first.")]) -> None:
    """Make a key worthless, within seconds on every server."""
    from neuroloop.bootstrap import services
    from neuroloop.serving import keyring

    key = keyring.revoke(services().keys, key_id, by="the command line")
    print(f"the key {key.id} of {key.name} is revoked")


def _logged() -> "Services":
    """The services of the current settings; where lines are for a collector, every line of this process is one."""
    from neuroloop.bootstrap import services
    from neuroloop.core import logs

    outside = services()
    if outside.settings.log_format == "ecs":
        logs.configure("ecs", "loop")
    return outside


def _new_run(kind: str) -> str:
    """The id of a run that begins now; another for each, also of those that begin in the same second."""
    return f"{kind}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _url(place: str) -> str:
    """A folder or URL as the store's URL."""
    try:
        return (place if "://" in place else f"file://{Path(place).expanduser().absolute()}").rstrip("/")
    except RuntimeError as error:
        raise NeuroLoopError(f"{place!r} is no folder", why=str(error), fix="write the whole path") from None


def _below(url: str, name: str) -> str:
    """A folder of that name in a store: before the query of `gs://bucket?endpoint=...`; folders here may hold a '?'."""
    place, mark, query = url.partition("?") if url.startswith("gs://") else (url, "", "")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def _json_object(option: str, text: str) -> dict[str, Any] | None:
    """The JSON object an option gives; None where it is empty."""
    if not text:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise NeuroLoopError(f"{option} is no JSON", why=str(error)) from error
    if not isinstance(value, dict):
        raise NeuroLoopError(f"{option} is no JSON object", fix="""write for example '{"learning_rate": 0.002}'""")
    return value


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
