"""The trainer: runs one generation of a fine-tune job from its last committed checkpoint."""
