"""How a store is checked against what was recorded when it was written."""
