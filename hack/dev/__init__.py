"""`make dev`: the working tree runs in the cluster, without an image being built."""
