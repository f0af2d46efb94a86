"""Views of a sweep as PNG, SVG and PDF figures."""
