"""One module per `homelab` verb: parse, call the library, print."""
