"""Frames decoded by NVDEC, the video decoder of NVIDIA's GPUs."""
