"""OpenAI's Files and Batches: many requests in one file, answered when nobody else asks."""
