"""The runtime's ports: OpenAI and Open Inference Protocol for users, admin for the operator."""
