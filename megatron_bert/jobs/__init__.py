"""Answers a scheduler's job scripts: how to start on the ranks they got, and whether to go on."""
