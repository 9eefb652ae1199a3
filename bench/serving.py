"""The inference service under load, against `mlflow models serve` and a plain FastAPI + Keras service, in one run.

`make bench-serving` prints a table and writes bench/results/serving.json. Each server has one and the same core to
itself; PostgreSQL (which flushes each commit), MLflow and the clients (locust) have the others. The three serve the
same network. Ours answers with a heat map, and has stored the image and written its row before; MLflow gets the
canonical image as JSON, which a client would have to make first; the plain service decodes an upload and calls
`keras.Model.predict`.

1. Ready: seconds from the start of the process to `GET /health/ready` 200, PostgreSQL and MLflow being up.
2. One client, one request after another: p50 and p99. Then four: requests a second. The servers take turns, round by
   round, so that a busy spell of the machine hits all.
3. Ten times the load that ours could do, at a fixed rate: what is answered and how soon, and whether the probes are.

Without `--bundle FOLDER` the network is untrained, which changes its answers and not its time. The uploads are
simulated scans of 512 x 512, or real ones where `NEUROLOOP_REAL_DATA` names a folder of them. The limit of requests
with one key is set high for this. All traffic stays on 127.0.0.1.
"""

import argparse
import contextlib
import io
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # the harness of the tests: PostgreSQL and MLflow as processes

import httpx
import numpy as np
from inference import pixels_of
from PIL import Image
from report import save

from conftest import PostgresServer, free, mlflow_server, stop
from neuroloop.adapters.mlflow_registry import MODEL, MlflowRegistry
from neuroloop.core.credentials import new_key
from neuroloop.core.schemas import LABELS, NO_TUMOUR
from neuroloop.imaging.canonical import canonicalize
from neuroloop.model import calibration
from neuroloop.model.bundle import Bundle, OnnxModel, write

SIDE, UPLOADS, SIZE = 512, 24, 128
TARGETS = {
    "p50_ms": 10.0,
    "p99_ms": 50.0,
    "times_mlflow": 10.0,
    "times_fastapi_keras": 5.0,
    "rss_mb": 350.0,
    "ready_seconds": 3.0,
    "p99_ratio_at_10x": 4.0,
}
KEY = new_key()
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, OTHER_CORES = {CORES[-1]}, set(CORES[:-1]) or {CORES[-1]}


@dataclass
class Server:
    """A server on its one core, and how its clients ask it."""

    name: str
    process: subprocess.Popen
    port: int
    path: str
    kind: str
    bodies: Path
    key: str = ""

    def cpu_seconds(self) -> float:
        """Processor time so far of the process and of those it started; waiting for others on the core is none."""
        seconds, pids = 0.0, [self.process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pids += map(int, (task / "children").read_text().split())
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        return seconds

    def rss_mb(self) -> dict[str, float]:
        """Resident memory now, and the most there was, of the process and of all it started, MB."""
        pids, now, peak = [self.process.pid], {}, 0.0
        for pid in pids:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pids += map(int, (task / "children").read_text().split())
                status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                now[pid] = int(status["VmRSS"].split()[0]) / 1000
                peak += int(status["VmHWM"].split()[0]) / 1000
        rest = sum(now.values()) - now[self.process.pid]
        return {"process": round(now[self.process.pid]), "children": round(rest), "peak_of_all": round(peak)}


def scans() -> list[np.ndarray]:
    """Uploads of every class, uint8, simulated ones in the size that people upload."""
    kind, pixels = pixels_of(96)
    if kind == "real scans":
        return pixels
    return [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in pixels]


def untrained_bundle(seed: int, images: np.ndarray, folder: Path) -> Path:
    """A whole bundle around an untrained network, with a gate that accepts all: both take as long."""
    import keras

    from neuroloop.model import export, gate_training, network

    keras.utils.set_random_seed(seed)
    model = network.build(SIZE)
    onnx = export.export_onnx(model)
    exported = OnnxModel(onnx)
    outputs = exported.run(images[:100])
    fitted = gate_training.fit_gate(
        exported.answers,
        (images[:100], np.arange(100) % len(LABELS)),
        (images[:100], np.arange(100) % len(LABELS)),
        np.random.default_rng(seed),
        steps=1,
        per_kind=1,
    )
    accepting = fitted.facts.model_copy(update={"offset": -1e6, "far": 1e6, "doubtful": 1.0})
    return write(
        folder,
        onnx=onnx,
        gate=fitted._replace(facts=accepting),
        statistics=b"{}",
        image_size=SIZE,
        architecture="compact",
        calibration=calibration.fit(outputs.logits, np.arange(len(outputs.logits)) % len(LABELS)),
        data_version="none",
        simulated=True,
        metrics={},
        weights=export.save_weights(model),
    )


def a_bundle(folder: Path, given: Path | None, pixels: list[np.ndarray]) -> tuple[Path, list[np.ndarray]]:
    """The bundle, and those of the uploads that it takes and names a tumour: only they have a heat map."""
    images = np.stack([canonicalize(one, SIZE) for one in pixels])
    for seed in range(20):
        path = given or untrained_bundle(seed, images, folder / f"bundle-{seed}")
        bundle = Bundle.load(path)
        fitting = np.stack([canonicalize(one, bundle.image_size) for one in pixels])
        said = bundle.predict(fitting)
        chosen = [
            one
            for one, image, novelty, logits in zip(pixels, fitting, said.novelty, said.logits, strict=True)
            if LABELS[int(logits.argmax())] != NO_TUMOUR and bundle.gate.judge(image, float(novelty)).accepted
        ]
        if len(chosen) >= UPLOADS:
            return path, chosen[:UPLOADS]
        if given is not None:
            break
    raise SystemExit("the model names too few of the uploads a tumour to measure heat maps")


def forms(pixels: list[np.ndarray], folder: Path) -> tuple[Path, str]:
    """The uploads as bodies of a form with a JPEG each, one file a body; and their Content-Type."""
    boundary = uuid.uuid4().hex
    folder.mkdir()
    for number, one in enumerate(pixels):
        out = io.BytesIO()
        Image.fromarray(one).save(out, "JPEG", quality=90)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="scan.jpg"\r\n'
        body = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + out.getvalue() + f"\r\n--{boundary}--\r\n".encode()
        (folder / f"{number:03d}").write_bytes(body)
    return folder, f"multipart/form-data; boundary={boundary}"


def invocations(pixels: list[np.ndarray], size: int, folder: Path) -> tuple[Path, str]:
    """The canonical images as `mlflow models serve` takes them."""
    folder.mkdir()
    for number, one in enumerate(pixels):
        values = canonicalize(one, size)[None, ..., None].tolist()
        (folder / f"{number:03d}").write_text(json.dumps({"inputs": {"image": values}}, separators=(",", ":")))
    return folder, "application/json"


def start(argv: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """A process on the servers' core."""
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, SERVER_CORE),
        )


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 180) -> float:
    """Seconds until `url` answers 200."""
    started = time.monotonic()
    with httpx.Client(trust_env=False, timeout=5) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).status_code == 200:
                    return time.monotonic() - started
            if process.poll() is not None or time.monotonic() - started > seconds:
                raise SystemExit(f"{process.args} did not come up:\n{log.read_text()[-3000:]}")
            time.sleep(0.02)


def load(server: Server, folder: Path, *, clients: int, seconds: float, wait: float = 0.0) -> dict[str, dict]:
    """Let `clients` ask for `seconds`; status -> answers, a second, quantiles in ms."""
    out = folder / f"load-{uuid.uuid4().hex[:8]}.json"
    before = server.cpu_seconds()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "serving_load.py"), "--headless"),
            *("--host", f"http://127.0.0.1:{server.port}", "--users", str(clients), "--spawn-rate", str(clients)),
            *(
                "--run-time",
                f"{seconds:g}s",
                "--json-file",
                str(out.with_suffix("")),
                "--loglevel",
                "ERROR",
                "--stop-timeout",
                "30",
            ),
        ],
        env=os.environ
        | {
            "LOAD_BODIES": str(server.bodies),
            "LOAD_PATH": server.path,
            "LOAD_TYPE": server.kind,
            "LOAD_KEY": server.key,
            "LOAD_WAIT": str(wait),
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, OTHER_CORES),
    )
    found = {}
    cpu = server.cpu_seconds() - before
    for row in json.loads(out.read_text()) if out.exists() else []:
        times = sorted((float(ms), count) for ms, count in row["response_times"].items())
        took = max(row["last_request_timestamp"] - row["start_time"], seconds)
        found[row["name"]] = {"count": row["num_requests"], "seconds": took, "times": times, "cpu": cpu}
    if not found:
        raise SystemExit(f"locust measured nothing:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return found


def merged(rounds: list[dict[str, dict]], status: str) -> dict[str, float]:
    """Answers of one status over several rounds: a second (of all rounds' time), and quantiles in ms."""
    times: dict[float, int] = {}
    for one in rounds:
        for ms, count in one.get(status, {}).get("times", []):
            times[ms] = times.get(ms, 0) + count
    count = sum(times.values())
    if not count:
        return {"count": 0, "per_second": 0.0, "p50_ms": 0.0, "p99_ms": 0.0, "cpu_ms": 0.0}
    seconds = sum(max((each["seconds"] for each in one.values()), default=0.0) for one in rounds)

    def quantile(share: float) -> float:
        passed = 0
        for ms, number in sorted(times.items()):
            passed += number
            if passed >= share * count:
                return ms
        return max(times)

    return {
        "count": count,
        "per_second": round(count / seconds, 2),
        "p50_ms": quantile(0.5),
        "p99_ms": quantile(0.99),
        "cpu_ms": round(1000 * sum(one[status]["cpu"] for one in rounds if status in one) / count, 2),
    }


@contextlib.contextmanager
def probed(port: int) -> Iterator[dict[str, list]]:
    """Ask the probes ten times in two seconds meanwhile: what they said and how long it took, ms."""
    found: dict[str, list] = {"live": [], "ready": []}
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
            while not ended.wait(0.2):
                for probe, answers in found.items():
                    started = time.monotonic()
                    try:
                        status = client.get(f"/health/{probe}").status_code
                    except httpx.HTTPError:
                        status = 0
                    answers.append((status, round(1000 * (time.monotonic() - started), 1)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def main() -> None:
    """Start, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; default: one around an untrained network")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one server's turn in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3, help="starts of which the median counts")
    parser.add_argument("--only-ours", action="store_true", help="without the two rivals")
    given = parser.parse_args()
    os.sched_setaffinity(0, OTHER_CORES)
    folder = Path(tempfile.mkdtemp(prefix="neuroloop-bench-"))
    folder.chmod(0o755)  # PostgreSQL's own user must reach it
    postgres = PostgresServer(folder / "postgres", free(), secrets.token_urlsafe(16), durable=True)
    servers: list[Server] = []
    result: dict[str, object] = {"arguments": {name: str(value) for name, value in vars(given).items()}}
    try:
        bundle, pixels = a_bundle(folder, given.bundle, scans())
        size = Bundle.load(bundle).image_size
        form, form_type = forms(pixels, folder / "forms")
        postgres.start()
        with mlflow_server(folder, free()) as mlflow:
            registry = MlflowRegistry(mlflow)
            run = registry.open_run("bench", experiment="bench")
            registry.set_alias("champion", registry.register(run, bundle, tags={}).version)

            # Ours, started a few times.
            port, log = free(), folder / "ours.log"
            argv = [sys.executable, "-m", "neuroloop.serving.server"]
            environment = {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "NEUROLOOP_HOME": str(folder / "home"),
                "NEUROLOOP_ENV_FILE": str(folder / "none"),
                "NEUROLOOP_DATABASE_URL": postgres.new_database(),
                "NEUROLOOP_MLFLOW_TRACKING_URI": mlflow,
                "NEUROLOOP_UI_API_KEY": KEY,
                "NEUROLOOP_RATE_LIMIT": "10000000",
            }
            (folder / "home").mkdir()
            starts = []
            for number in range(given.starts + 1):
                process = start(argv, log, environment | {"NEUROLOOP_API_PORT": str(port)})
                servers = [Server("ours", process, port, "/v1/predictions", form_type, form, KEY)]
                seconds = wait_for(f"http://127.0.0.1:{port}/health/ready", process, log)
                if number:  # the first makes the schema
                    starts.append(round(seconds, 2))
                if number < given.starts:
                    stop(process)
            ours = servers[0]
            result["ready_seconds"] = {"each": starts, "median": statistics.median(starts)}
            result["rss_mb_idle"] = ours.rss_mb()

            if not given.only_ours:
                canonical, json_type = invocations(pixels, size, folder / "canonical")
                port = free()
                argv = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
                argv += ["--model-uri", f"models:/{MODEL}@champion", "--host", "127.0.0.1", "--port", str(port)]
                process = start(
                    argv,
                    folder / "mlflow-serve.log",
                    {"MLFLOW_TRACKING_URI": mlflow, "MLFLOW_DISABLE_TELEMETRY": "true"}
                    | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                )
                servers.append(Server("mlflow models serve", process, port, "/invocations", json_type, canonical))
                wait_for(f"http://127.0.0.1:{port}/ping", process, folder / "mlflow-serve.log")
                port = free()
                process = start(
                    [sys.executable, "-m", "uvicorn", "plain_service:app", "--no-access-log", "--port", str(port)],
                    folder / "keras.log",
                    {"BUNDLE": str(bundle), "PYTHONPATH": environment["PYTHONPATH"]},
                )
                servers.append(Server("FastAPI + Keras", process, port, "/predict", form_type, form))
                wait_for(f"http://127.0.0.1:{port}/health", process, folder / "keras.log")

            good = {"ours": "201"}
            alone: dict[str, list] = {each.name: [] for each in servers}
            four: dict[str, list] = {each.name: [] for each in servers}
            for each in servers:  # warm
                load(each, folder, clients=2, seconds=3)
            for _ in range(given.rounds):
                for each in servers:
                    alone[each.name].append(load(each, folder, clients=1, seconds=given.seconds))
                    four[each.name].append(load(each, folder, clients=4, seconds=given.seconds))
            rows = {}
            for each in servers:
                status = good.get(each.name, "200")
                rows[each.name] = {
                    "one client": merged(alone[each.name], status),
                    "four clients": merged(four[each.name], status),
                    "other_statuses": {
                        name: sum(one[name]["count"] for one in alone[each.name] + four[each.name] if name in one)
                        for name in {n for one in alone[each.name] + four[each.name] for n in one} - {status}
                    },
                    "rss_mb": each.rss_mb(),
                }
            result["servers"] = rows

            # Ten times the load.
            mine = rows["ours"]
            rate = 10 * mine["four clients"]["per_second"]
            clients = 200
            with probed(ours.port) as probes:
                crowd = [load(ours, folder, clients=clients, seconds=6 * given.seconds, wait=clients / rate)]
            after = [load(ours, folder, clients=4, seconds=given.seconds)]
            answered = merged(crowd, "201")
            result["ten times"] = {
                "asked_per_second": round(rate, 1),
                "sent_per_second": round(sum(merged(crowd, status)["per_second"] for status in crowd[0]), 1),
                "answered": answered,
                "others": {status: merged(crowd, status) for status in crowd[0] if status != "201"},
                "p99_ratio": round(answered["p99_ms"] / mine["four clients"]["p99_ms"], 2),
                "probes": {
                    name: {
                        "asked": len(said),
                        "good": sum(status == 200 for status, _ in said),
                        "largest_ms": max((ms for _, ms in said), default=None),
                    }
                    for name, said in probes.items()
                },
                "afterwards": merged(after, "201"),
            }
            result["rss_mb_after"] = ours.rss_mb()
    finally:
        for each in servers:
            stop(each.process)
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)
    show(result)


def show(result: dict) -> None:
    """The table, the targets and the file."""
    rows, ten = result["servers"], result["ten times"]
    print(
        f"{'one core':22} {'p50 ms':>8} {'p99 ms':>8} {'req/s, 4':>9} {'ours is':>9} {'CPU ms':>8} {'ours is':>9} "
        f"{'RSS MB':>8}"
    )
    mine = rows["ours"]
    for name, row in rows.items():
        ratio = mine["four clients"]["per_second"] / max(row["four clients"]["per_second"], 1e-9)
        row["ours_is_times_faster"] = round(ratio, 2)
        figures = (row["one client"]["p50_ms"], row["one client"]["p99_ms"], row["four clients"]["per_second"])
        cpu = row["four clients"]["cpu_ms"]
        row["ours_takes_times_less_cpu"] = cheaper = round(cpu / max(mine["four clients"]["cpu_ms"], 1e-9), 2)
        memory = row["rss_mb"]["process"] + row["rss_mb"]["children"]
        print(
            f"{name:22} {figures[0]:8.1f} {figures[1]:8.1f} {figures[2]:9.1f} {ratio:8.1f}x {cpu:8.1f} {cheaper:8.1f}x "
            f"{memory:8}"
        )
        if row["other_statuses"]:
            print(f"  other statuses: {row['other_statuses']}")
    statuses = {status: row["count"] for status, row in ten["others"].items()}
    print(
        f"\nten times the load: {ten['sent_per_second']} of {ten['asked_per_second']} req/s sent, "
        f"{ten['answered']['per_second']} answered, p99 {ten['answered']['p99_ms']} ms "
        f"({ten['p99_ratio']}x of that with four clients); the rest: {statuses}"
    )
    print(f"probes meanwhile: {ten['probes']}")
    print(f"ready after {result['ready_seconds']['median']} s; RSS {result['rss_mb_after']}")
    memory = result["rss_mb_after"]
    faster = {name: row["ours_is_times_faster"] for name, row in rows.items()}
    refused = set(ten["others"]) <= {"429", "503"}
    reached = {
        "p50_ms": mine["one client"]["p50_ms"] <= TARGETS["p50_ms"],
        "p99_ms": mine["one client"]["p99_ms"] <= TARGETS["p99_ms"],
        "times_mlflow": faster.get("mlflow models serve", 0) >= TARGETS["times_mlflow"],
        "times_fastapi_keras": faster.get("FastAPI + Keras", 0) >= TARGETS["times_fastapi_keras"],
        "rss_mb": memory["process"] + memory["children"] <= TARGETS["rss_mb"],
        "ready_seconds": result["ready_seconds"]["median"] <= TARGETS["ready_seconds"],
        "p99_ratio_at_10x": ten["p99_ratio"] <= TARGETS["p99_ratio_at_10x"] and refused,
    }
    result |= {"targets": TARGETS, "reached": reached}
    print("targets: " + ", ".join(f"{what} {'reached' if ok else 'MISSED'}" for what, ok in reached.items()))
    save("serving", result)


if __name__ == "__main__":
    main()
