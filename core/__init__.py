"""What every stage stands on. It knows nothing of reward models or PPO."""
