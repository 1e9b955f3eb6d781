"""The report's section on what `deitkit analyze` found, read from ``analysis.json`` and pictures alone."""

FORMAT = 1
