"""Results side by side: with each other and with published figures."""
