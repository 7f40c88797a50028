"""One file for each way to learn; `registry` knows them by name."""
