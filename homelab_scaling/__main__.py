"""`python -m homelab_scaling` is `homelab`."""

from homelab_scaling.cli import main

raise SystemExit(main())
