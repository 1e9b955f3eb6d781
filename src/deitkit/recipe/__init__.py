"""What to run: the schema of a recipe, the reader of its file, and the shipped recipes. Nothing here touches data."""
