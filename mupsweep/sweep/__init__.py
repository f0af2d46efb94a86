"""What is to be run: configs, run specifications, the plan, and the search for LRs."""
