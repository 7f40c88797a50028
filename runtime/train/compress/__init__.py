"""Making a model smaller, or one out of several, without training it."""
