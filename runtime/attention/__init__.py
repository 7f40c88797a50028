"""Attention backends behind one call; each reads and writes its own kind of batch."""
