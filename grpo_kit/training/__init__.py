"""Training: the loop, the step, several processes, and going on with or repeating what was trained."""
