"""Views of a sweep as text in a terminal."""
