"""`python -m picture3d.cli`, for launchers that start modules."""

from picture3d.cli import main

if __name__ == "__main__":
    main()
