"""What a trained classifier is worth: predictions, readouts, statistics. Nothing here trains or chooses."""
