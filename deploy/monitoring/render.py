#!/usr/bin/env python3
"""Writes the PrometheusRule of Kubernetes from alerts.yml:  deploy/monitoring/render.py. A test compares the two."""

from pathlib import Path
from textwrap import indent

HERE = Path(__file__).resolve().parent
MANIFEST = HERE.parent / "kubernetes" / "base" / "alerts.yaml"
HEAD = """\
# Written by deploy/monitoring/render.py from deploy/monitoring/alerts.yml. Needs the Prometheus operator.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: alerts
  labels: { app.kubernetes.io/part-of: neuroloop }
spec:
"""


def manifest() -> str:
    """The rules as they stand, comments too, in a manifest."""
    return HEAD + indent((HERE / "alerts.yml").read_text(), "  ")


if __name__ == "__main__":
    MANIFEST.write_text(manifest())
