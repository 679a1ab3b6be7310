"""The kill loop: real processes, real servers, real SIGKILLs, and a checker that does not know idemq."""
