"""CLIP's mean of frames: no parameters, every other method's baseline."""
