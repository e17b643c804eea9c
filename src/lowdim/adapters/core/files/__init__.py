"""Adapters as files: lowdim's own folders, and PEFT's."""
