"""A finished run, analysed: agreement, calibration, confusions, attention."""
