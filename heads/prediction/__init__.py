"""Predicts the classes of video files that belong to no data set."""
