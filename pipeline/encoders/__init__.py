"""Finds and loads CLIP models: by name, from files, and with fine-tuned towers."""
