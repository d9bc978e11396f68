"""Process groups, device mesh and collectives as autograd functions."""
