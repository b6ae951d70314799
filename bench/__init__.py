"""Benchmarks: `pytest bench --benchmark` anywhere, `python bench/gpu.py --minutes 10 --out DIR` on a GPU."""
