"""The pieces of a step timed alone, each by every implementation available."""
