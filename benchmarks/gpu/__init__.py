"""What bench_gpu.py measures: a module for each section, and the table they fill."""
