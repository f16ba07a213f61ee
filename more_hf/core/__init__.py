"""The method and what was done to one model; torch and safetensors only."""
