"""Data that is prepared in blocks, so that memory does not grow with it."""
