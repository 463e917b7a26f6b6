"""Packed data sets: WebDataset tars, written and read."""
