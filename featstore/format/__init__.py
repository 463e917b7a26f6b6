"""The parts of a store: arrays, metadata, provenance and checksums."""
