"""The clips of end-to-end training: their order, loading and streaming."""
