"""What is told of a fault that nobody foresaw, without secrets."""
