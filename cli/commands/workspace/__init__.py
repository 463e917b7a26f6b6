"""Commands that look after what lies in the workspace."""
