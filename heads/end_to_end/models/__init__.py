"""What is trained end to end: towers, head and class texts as one module."""
