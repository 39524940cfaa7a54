"""`python -m radloop.cli`: how engines call radloop under an environment's own Python."""

from __future__ import annotations

from radloop.cli import main

if __name__ == "__main__":
    main()
