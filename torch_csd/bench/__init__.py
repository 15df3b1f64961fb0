"""Benchmarks: what `torch-csd bench` runs. Every row stands beside a roof or a peer measured in the same run.

`attention`, `decode`, `prefill`, `io` and `accuracy` each have `run(settings, report, ...)`; `report` prints and
saves, `roofs` knows how fast the drive and the memory are, `peers` what others do with the same bytes, `dense` what
accuracy is compared with. No test depends on a timing.
"""
