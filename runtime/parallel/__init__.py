"""Ranks that share a model, by tensors and by layers: how they start, speak and end."""
