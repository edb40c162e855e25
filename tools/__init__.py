"""What makes the things that the repository ships; nothing in `grpo_kit` imports it."""
