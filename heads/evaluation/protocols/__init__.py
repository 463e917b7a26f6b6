"""Which videos, classes and views a number stands for."""
