"""A real Kueue beside an API server: what admits the jobs that name a queue."""
