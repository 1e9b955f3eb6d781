"""Students, CNNs, and their common classifier. Reading, adapting and writing weights is in ``weights``."""
