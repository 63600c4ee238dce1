"""Programs that tests start, some of them under torchrun."""
