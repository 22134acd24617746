"""Reports: read, shown in a terminal, and rendered as one HTML page, from their JSON alone. Needs no torch."""

SCHEMA = "edgeguard.report/1"
