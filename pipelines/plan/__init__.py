"""What a configuration will cost before it runs: counted work x rates that are measured here, or published."""
