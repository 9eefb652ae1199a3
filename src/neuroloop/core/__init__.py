"""The vocabulary: schemas, settings, keys, ports and errors. Imports nothing of NeuroLoop."""
