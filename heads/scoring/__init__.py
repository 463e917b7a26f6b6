"""From frame features to scores of classes."""
