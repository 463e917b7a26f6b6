"""Where a CLIP comes from: names, files and fine-tuned towers."""
