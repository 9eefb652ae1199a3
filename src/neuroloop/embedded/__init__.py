"""The whole platform on one machine: generated secrets, ports, a supervisor, `make up`."""
