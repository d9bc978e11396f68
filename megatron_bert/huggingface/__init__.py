"""Modeling code that travels with an export; imports nothing of the rest."""
