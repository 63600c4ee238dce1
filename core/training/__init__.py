"""DeepSpeed engines, ranks, and weights gathered from their partitions."""
