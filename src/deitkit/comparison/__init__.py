"""Whole runs: a comparison, an ablation, fine-tuning, and what is measured again of a finished one."""
