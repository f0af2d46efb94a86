"""`python -m mupsweep` is the `mupsweep` command."""

from mupsweep.cli import main

if __name__ == "__main__":
    main()
