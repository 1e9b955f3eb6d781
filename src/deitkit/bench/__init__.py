"""How fast training and inference are. Nothing here is part of a run."""
