"""Publish a slim checkpoint: the files of a repository of the Hugging Face hub, and its model card."""
