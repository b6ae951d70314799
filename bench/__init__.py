"""Benchmarks. Run `pytest bench --benchmark` anywhere, or `python bench/gpu.py --minutes 10 --out DIR` on a GPU."""
