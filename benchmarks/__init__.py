"""lrjax beside its peers, each comparison in one run on one machine: `python -m benchmarks.NAME`."""
