"""recipes/pretrain.py that looks for orders at every chance and meets often while it sleeps; run as a script."""

import sys

from homelab_scaling.recipes import pretrain
from homelab_scaling.train import obey, orders

if __name__ == "__main__":
    orders.READ_EVERY_S, obey.DOZE_S, obey.RENDEZVOUS_S = 0.0, 0.02, 0.2
    raise SystemExit(pretrain.main(sys.argv[1:]))
