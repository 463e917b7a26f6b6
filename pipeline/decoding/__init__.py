"""Frames out of video files: the contract of a decoder and its implementations."""
