"""What a gate asks: each suite puts the held-out samples to base and candidate in its own way."""
