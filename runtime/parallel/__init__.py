"""Tensor parallelism: a group of ranks, how it starts, speaks and ends."""
