"""`python -m routeseg.cli`, the same as `routeseg`."""

from routeseg.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
