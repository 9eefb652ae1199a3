"""From a source to a frozen, grouped split: audit, dataset, statistics. No I/O, no vendor."""
