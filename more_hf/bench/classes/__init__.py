"""Classes and samples forgotten by an image classifier."""
