"""The machine: device, precision, clocks, random numbers, files. Nothing about images or training."""
