"""Trainers train one run: mupsweep's own training loop, or a program of the user's; one file and one yaml each."""
