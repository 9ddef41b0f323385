"""`python -m kttrio` is `kttrio`."""

from __future__ import annotations

from kttrio.cli.main import main

if __name__ == "__main__":
    main()
