"""Students, CNNs, and the classifier around either. Reading, changing and writing weights is in ``weights``."""
