"""Us and a peer on the same work in one run; each module is one command."""
