"""Reads official and common annotation formats into a listing of videos, classes and splits."""
