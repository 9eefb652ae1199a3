"""The outside world, one vendor a file. Adapters implement `core.ports` and do not know one another."""
