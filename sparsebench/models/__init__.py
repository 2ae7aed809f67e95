"""Models and where they can be sparse: `language` (transformers), `sites` (structure of a transformer block)."""
