"""Damage in a store: how it is looked for and noted."""
