"""Images on disk to batches of tensors: index, decode, transform, order, load."""
