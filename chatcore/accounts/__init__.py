"""User accounts: passwords, log-in and tokens, for workers (``service``) and for the command line (``admin``)."""
