"""Weights that a method's authors released, as an encoder and a head of a workspace."""
