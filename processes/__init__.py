"""Several processes of one command: started by ``--gpus`` or torchrun, sharing out the work."""
