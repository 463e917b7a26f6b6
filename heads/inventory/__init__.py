"""What a workspace holds, what is missing in it, and how a part of it is removed."""
