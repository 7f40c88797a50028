"""Writes the files that follow from the code: CRDs and the reference pages of both kinds."""
