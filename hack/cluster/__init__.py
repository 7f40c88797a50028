"""A real one-node Kubernetes on this machine, from Go modules and Debian packages.

Runs with the system's Python and its standard library alone, so that a fresh machine can build
the cluster while the project's environment is still being made. Must not import mizzen.
"""
