"""Training on several devices: Fabric, FSDP2, and the supervision of processes."""
