"""The generated world of the demo, and the small CLIP that was trained on it."""
