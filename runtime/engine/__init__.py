"""The inference engine: scheduler, KV blocks, runner, sampler and the loop that joins them."""
