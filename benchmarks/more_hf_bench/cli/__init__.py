"""The commands `more-hf bench` and `more-hf demo`, which `more-hf` finds by their entry points."""
