"""Generates what of the Helm chart follows from something else."""
