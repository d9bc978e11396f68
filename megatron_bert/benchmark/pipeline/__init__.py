"""Pipeline schedules by ranks that sleep in place of computing."""
