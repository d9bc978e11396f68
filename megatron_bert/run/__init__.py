"""The folder of a run: who holds it, what its jobs did and measured, and what is made of that."""
