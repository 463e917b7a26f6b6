"""The plain temporal transformer: MoTE's head with one expert and no merged pass."""
