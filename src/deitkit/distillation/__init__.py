"""The table of methods, and their losses as pure functions. Nothing here trains."""
