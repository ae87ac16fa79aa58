"""Benchmarks: run from a checkout as `python -m bench.NAME`; results worth keeping go to LOG.md."""
