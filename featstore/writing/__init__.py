"""How the partitions of a store are written."""
