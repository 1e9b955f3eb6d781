"""The networks: students (vit), CIFAR and small-image CNNs (cnn), classifiers by name (zoo), weights files (weights)."""
