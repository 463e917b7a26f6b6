"""Video files to tars, tars to frames, frames to the features of a frozen CLIP."""
