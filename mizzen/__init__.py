"""Mizzen: language models served and trained on Kubernetes.

The import root: `mizzen.operator` and `mizzen.runtime` are links to the folders of the same name.
"""
