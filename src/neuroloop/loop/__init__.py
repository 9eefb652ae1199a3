"""Offline use cases: one function per DAG task."""
