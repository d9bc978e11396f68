"""Reports on recorded runs: one page with curves, events and settings."""
