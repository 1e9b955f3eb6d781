"""Evaluation of trained classifiers: predictions, readouts, statistics. Nothing here trains or selects."""
