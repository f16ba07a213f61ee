"""Find the edit that suits a model: candidates, a judge, a search, and the study that it makes."""
