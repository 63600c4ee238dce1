"""The pipeline itself: configuration, artefacts, data, generation, training engine, gold, evaluation, report."""
