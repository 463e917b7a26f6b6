"""What a store consists of: arrays, metadata, provenance and checksums."""
