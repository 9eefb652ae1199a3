"""Nothing lost, nothing doubled, nothing mixed up: many clients, and the API and PostgreSQL killed under them.

`make bench-faults` prints the figures and writes bench/results/serving_faults.json. Three parts, each on a real API
process that is started again whenever it ends, a real PostgreSQL that flushes each commit, and a folder store:

1. 50 clients with 40 requests each, whose answers are known: answers, maps, rows and objects that are not their own;
2. the API killed (SIGKILL) 100 times at random moments under load, with corrections;
3. every process of PostgreSQL killed 50 times during writes, with corrections.

Clients repeat a request with its Idempotency-Key until it is answered. Afterwards every acknowledged prediction and
correction must have its object and its row, once. All traffic stays on 127.0.0.1.
"""

import argparse
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

from report import save

ROOT = Path(__file__).parents[1]
# The harness, whose small edition the tests play; in place of this folder, whose serving.py would hide its `serving`.
sys.path[0] = str(ROOT / "tests")

from conftest import PostgresServer, free, mlflow_server
from neuroloop.adapters.mlflow_registry import MlflowRegistry
from neuroloop.bootstrap import Services
from neuroloop.core.settings import Settings
from neuroloop.model.bundle import Bundle
from serving.endurance import Clients, account, kill_postgres, kill_server, running
from serving.running import canary_of, write_bundle

BACK_WITHIN = 30.0  # seconds, the target


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and largest, seconds."""
    ordered = sorted(seconds)
    return {"median": round(ordered[len(ordered) // 2], 2), "largest": round(ordered[-1], 2)} if ordered else {}


def main() -> None:
    """Play, count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=40, help="of each client")
    parser.add_argument("--api-kills", type=int, default=100)
    parser.add_argument("--database-kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generator = random.Random(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="neuroloop-bench-"))
    folder.chmod(0o755)  # PostgreSQL's own user must reach it
    postgres = PostgresServer(folder / "postgres", free(), secrets.token_urlsafe(16), durable=True)
    result: dict[str, object] = {"arguments": vars(given)}
    try:
        postgres.start()
        with mlflow_server(folder, free()) as mlflow:
            registry = MlflowRegistry(mlflow)
            bundle = write_bundle(folder / "bundle", canary=canary_of(write_bundle(folder / "plain")))
            run = registry.open_run("bench", experiment="bench")
            registry.set_alias("champion", registry.register(run, bundle, tags={}).version)
            loaded = Bundle.load(bundle)
            for part in ("clients", "api killed", "database killed"):
                home = folder / part.replace(" ", "-")
                home.mkdir()
                settings = Settings(home=home, database_url=postgres.new_database(), mlflow_tracking_uri=mlflow)
                services = Services(settings)
                started, seconds = time.monotonic(), list[float]()
                with running(services, folder / f"{home.name}.log") as server:
                    if part == "clients":
                        clients = Clients(server.port, given.clients, given.requests)
                        asked = clients.join()
                    else:
                        clients = Clients(server.port, 8, correct_every=3)
                        try:
                            if part == "api killed":
                                seconds = kill_server(server, clients, given.api_kills, generator)
                            else:
                                seconds = kill_postgres(postgres, server, clients, given.database_kills, generator)
                        finally:
                            asked = clients.finish()
                taken = time.monotonic() - started
                figures = {
                    "requests": len(asked),
                    "answered": clients.answered(),
                    "corrected": sum(bool(one.corrected) for one in asked),
                    "asked_again": sum(one.tries for one in asked) - len(asked) - sum(bool(o.corrected) for o in asked),
                    "kills": len(seconds),
                    "seconds": round(taken, 1),
                    "ready_again_seconds": quantiles(seconds),
                    "faults": clients.faults[:10],
                    "wrong": account(services, asked, loaded),
                }
                result[part] = figures
                print(f"{part}: {json.dumps(figures)}", flush=True)
                leftovers = figures["wrong"].pop("leftovers_swept")
                figures["leftovers_swept"] = leftovers
                figures["passed"] = (
                    not clients.faults
                    and not any(figures["wrong"].values())
                    and all(each <= BACK_WITHIN for each in seconds)
                )
    finally:
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)
    save("serving_faults", result)
    print(json.dumps(result, indent=1))
    failed = [part for part, figures in result.items() if isinstance(figures, dict) and figures.get("passed") is False]
    if failed:
        raise SystemExit(f"something was wrong, lost, doubled or not ready in time: {', '.join(failed)}")


if __name__ == "__main__":
    main()
