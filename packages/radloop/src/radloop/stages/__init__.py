"""The loop's stages: each a thin use of the rooms below. Importing a module here imports nothing heavy."""
