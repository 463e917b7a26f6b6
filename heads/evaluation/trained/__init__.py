"""Protocols that train heads before they test them."""
