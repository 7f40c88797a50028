"""Hostile requests for every protocol, and what must not come of them."""
