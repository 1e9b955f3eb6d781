"""Sources of images: folders, parquet files, named data sets and their archives."""
