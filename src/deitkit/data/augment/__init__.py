"""How a batch of images becomes a view, on the images' device, with one draw an image."""
