"""Pipeline schedules, measured with ranks that sleep instead of computing."""
