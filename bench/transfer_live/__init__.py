"""Bulk over a real broker: how fast, how fair and how complete it moves.  `make bench-transfer`."""
