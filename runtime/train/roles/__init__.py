"""Who draws answers, says what they are worth and how far they drifted: in the trainer or apart."""
