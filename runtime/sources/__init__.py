"""Model files from elsewhere (a hub, a bucket) into a folder on this node. Imports no torch."""
