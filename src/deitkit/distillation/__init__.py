"""The methods, as a table, and their losses, as pure functions. Nothing here trains."""
