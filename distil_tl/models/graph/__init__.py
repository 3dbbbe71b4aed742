"""Rewriting a network with torch.fx: folding BatchNorm, and cutting off the frozen part."""
