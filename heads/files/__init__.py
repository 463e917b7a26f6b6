"""Heads as files: our format, the authors' format and portable ones."""
