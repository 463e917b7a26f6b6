"""Commands that lead from nothing to features."""
