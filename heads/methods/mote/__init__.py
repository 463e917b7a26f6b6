"""MoTE (NeurIPS 2024) and the plain temporal transformer it is compared with."""
