"""Training steps: their speed, what it is made of, and what it is compared with."""
