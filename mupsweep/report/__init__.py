"""Report: the views of a sweep's records: terminal tables, figures, one HTML file, and the recipe for a target."""
