"""Stores in object storage (S3, GCS, Azure)."""
