"""Images and labels: finding, splitting, decoding, batching. File layouts are in ``sources``, views in ``augment``."""
