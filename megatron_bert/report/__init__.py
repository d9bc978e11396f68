"""Runs that were recorded, told to people: one page with curves, events and settings."""
