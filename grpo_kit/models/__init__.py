"""Adapters over transformers (the policy) and diffusers (the generator)."""
