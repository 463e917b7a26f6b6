"""Compares results with each other and with published figures."""
