"""Pictures and numbers: what an edit did to a model."""
