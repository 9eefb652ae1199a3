"""Ends with 0 where a part of the platform is healthy, else with 1 and the reason in words.

healthcheck.py http://127.0.0.1:5000/health     the URL answers 200
healthcheck.py tcp://127.0.0.1:1025             the port accepts connections
healthcheck.py http://airflow-api:8080 scheduler    Airflow's own monitor calls that part healthy

Only the standard library, because it runs every few seconds in each container: the program that Airflow offers for
this, `airflow jobs check`, costs seconds of CPU each time.
"""

import json
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

SECONDS = 5


def main(url: str, part: str = "") -> None:
    """Raise `OSError` or `SystemExit` unless `url`, or Airflow's `part` there, is healthy."""
    where = urlsplit(url)
    if where.scheme == "tcp":
        socket.create_connection((str(where.hostname), int(where.port or 0)), SECONDS).close()
        return
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is meant for the internet
    with direct.open(f"{url}/api/v2/monitor/health" if part else url, timeout=SECONDS) as answer:
        found = json.load(answer) if part else {}
    status = (found.get(part) or {}).get("status")
    if part and status != "healthy":
        raise SystemExit(f"{part} is {status or 'unknown'}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        raise SystemExit(f"{sys.argv[1]} does not answer: {error}") from None
