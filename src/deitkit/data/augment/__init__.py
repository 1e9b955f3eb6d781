"""Augmentation of a batch of images into a view, on the images' device, with separate draws for each image."""
