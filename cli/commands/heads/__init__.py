"""Commands that make heads, bring them in and take them elsewhere."""
