"""From a data set as it lies on the disk to augmented batches on the device."""
