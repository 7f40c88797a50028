"""One config-driven decoder: its description, its layers, its weights and its adapters."""
