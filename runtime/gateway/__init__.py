"""The front door: one OpenAI-compatible address for every served model. Imports no torch."""
