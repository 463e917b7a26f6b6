"""One folder for each method: its configuration, model and losses."""
