"""DAPO on Megatron-Core with vLLM rollouts."""
