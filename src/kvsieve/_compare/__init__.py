"""The parts of `kvsieve compare`: settings -> plan -> cells -> summary. `kvsieve.compare` puts them together."""
