"""A soak: PPO for hundreds of steps, and a hundred thousand requests to a reward server. Does anything grow?"""
