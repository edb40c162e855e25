"""Rewards: callables `(images, prompts, enhanced_prompts) -> (N,) float`, NaN where a sample cannot be scored."""
