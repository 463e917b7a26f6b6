"""MoTE (NeurIPS 2024). Its model also serves the plain transformer and the mean of frames."""
