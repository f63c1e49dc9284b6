"""Several devices: Fabric, FSDP2, and processes that end together."""
