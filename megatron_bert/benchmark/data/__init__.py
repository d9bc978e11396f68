"""The data side: preprocessing, planning, assembling rows, and what they hold."""
