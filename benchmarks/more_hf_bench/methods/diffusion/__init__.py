"""Published methods for text-to-image pipelines, and the controls that a table needs."""
