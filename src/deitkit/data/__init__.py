"""Images and labels: found, divided, decoded, batched. Layouts on the disk are in ``sources``, views in ``augment``."""
