"""What a sweep keeps on disk: records, results and leases, and the environment they were made in."""
