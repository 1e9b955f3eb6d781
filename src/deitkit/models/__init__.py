"""Students (vit), CNNs for small images (cnn), classifiers by name (zoo), their inputs (classifier), weights files."""
