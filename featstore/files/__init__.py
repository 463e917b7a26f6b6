"""Files and the machine below a store: safe writing, locks, memory and disk."""
