"""What is optimised: one module per training method."""
