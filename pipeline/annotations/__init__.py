"""Official and common annotation formats, read into one listing of videos, classes, splits."""
