"""From images on disk to batches of tensors: scan, decode, transform, sample, load."""
