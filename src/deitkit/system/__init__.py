"""The machine: device, precision, clocks, random draws, files. Nothing here is about images or training."""
