"""Spatial and temporal descriptions of classes, which guide the training of class texts."""
