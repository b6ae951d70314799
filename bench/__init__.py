"""Benchmarks: `pytest bench --benchmark` anywhere, `python bench/gpu.py --minutes 8 --out DIR` on a GPU."""
