"""The typed configuration tree, its loading and its cross-checks; imports no torch."""
