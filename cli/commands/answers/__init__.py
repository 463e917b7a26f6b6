"""Commands that ask a head, and commands that compare what it answered."""
