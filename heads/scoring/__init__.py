"""Turns frame features into scores of classes."""
