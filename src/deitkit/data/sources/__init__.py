"""Where images come from: folders, parquet files, named data sets and the archives that they come in."""
