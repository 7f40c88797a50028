"""`make demo`: from a fresh machine to a chat answer and on to a fine-tuned adapter that serves."""
