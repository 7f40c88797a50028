"""Data that is prepared in blocks, so that only its tokens, in a mapped file, grow with it."""
