"""Rows and arrays of a store, read and checked."""
