"""A run folder: what lies in it, how it is read and written, and who observes a run. Nothing here trains."""
