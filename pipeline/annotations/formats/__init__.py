"""One reader for each format of annotation files."""
