"""What is claimed of learning, rewards and evaluation, over several seeds."""
