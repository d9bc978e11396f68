"""Modeling code that travels with an export; imports nothing of the rest.

Every file here but this one is copied into the exported directory as it stands, so it must run with
transformers and PyTorch alone.
"""
