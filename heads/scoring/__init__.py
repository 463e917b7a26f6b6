"""Turns frame features into scores of classes."""

from typing import Final

TOP_K: Final = 5
"""The places of the second accuracy that is reported, and the classes that are named of a video."""
