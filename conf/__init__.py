"""Hydra configs of tl; a package so that an installed wheel finds them (pkg://tl.conf)."""
