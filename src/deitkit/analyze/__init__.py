"""What a finished run has learned, beyond accuracy: reads run folders, and never trains."""
