"""Benchmarks of training and inference. Nothing here is part of a run."""
