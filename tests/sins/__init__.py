"""What handlers do to the transaction that they are lent, on every driver, with and without a SIGKILL."""
