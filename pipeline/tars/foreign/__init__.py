"""Takes WebDataset tars that somebody else wrote, as they are and where they lie."""
