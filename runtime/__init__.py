"""The data plane: model, attention, tensor parallelism, engine, server and trainer."""
