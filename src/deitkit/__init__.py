"""deitkit: distil a CNN teacher into a small vision transformer, every method side by side."""

__version__ = "0.1.0"
