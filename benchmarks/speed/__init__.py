"""How fast the kit is, beside TRL and beside the bare libraries."""
