"""Triton kernels: jit functions and their launchers, one file per family. Imported as mixreorg_fast.kernels."""
