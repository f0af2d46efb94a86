"""What a sweep keeps on disk: records, results, leases, and the environment in which they were made."""
